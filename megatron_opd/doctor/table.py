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
LONGEST_CELL = 240  # characters; --json has the rest


def make_console() -> Console:
    """As wide as the terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def show(findings: Sequence[Finding], console: Console) -> None:
    """The table, and how many there are of each state."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    table.add_column("check", no_wrap=True)
    for column, ratio in (("found", 5), ("needed", 3), ("fix", 4)):
        table.add_column(column, ratio=ratio, overflow="fold")
    table.expand = True
    last = None
    for finding in findings:
        state = Text(finding.state, style=SHOWN[finding.state])
        name = "" if finding.check == last else finding.check
        table.add_row(state, name, *(_cell(text) for text in (finding.found, finding.needed, finding.fix)))
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


def _cell(text: str) -> Text:
    line = " ".join(text.split())
    return Text(line if len(line) <= LONGEST_CELL else f"{line[:LONGEST_CELL]}... (--json shows all)")
