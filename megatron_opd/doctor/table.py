"""Findings for a person, and for a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_opd.doctor.finding import STATES, Finding

WIDTH = 100  # where there is no terminal
SHOWN = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}
LONGEST_CELL = 300  # characters; --json has the rest


def make_console() -> Console:
    """As wide as the terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def show(findings: Sequence[Finding], console: Console) -> None:
    """The table, and how many there are of each state."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    table.add_column("found, needed, fix")
    last = None
    for finding in findings:
        name = "" if finding.check == last else finding.check
        table.add_row(Text(finding.state, style=SHOWN[finding.state]), name, _cell(finding))
        last = finding.check
    console.print(table)
    counts = Counter(finding.state for finding in findings)
    console.print(", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))


def as_plain(findings: Sequence[Finding]) -> dict[str, Any]:
    """For JSON."""
    return {"ok": is_good(findings), "checks": [asdict(finding) for finding in findings]}


def is_good(findings: Sequence[Finding]) -> bool:
    """Whether nothing failed."""
    return not any(finding.state == "failed" for finding in findings)


def _cell(finding: Finding) -> Text:
    """Below each other, because four columns of sentences cannot be read; what is good needs a line only."""
    if finding.state in ("ok", "skipped"):
        return Text(_clip(finding.found + (f"; needed: {finding.needed}" if finding.needed else "")))
    told = [Text(_clip(finding.found))]
    for name, text in (("needed", finding.needed), ("fix", finding.fix)):
        if text:
            told.append(Text.assemble((f"{name}: ", "dim"), _clip(text)))
    return Text("\n").join(told)


def _clip(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_CELL else f"{line[:LONGEST_CELL]}... (--json shows all)"
