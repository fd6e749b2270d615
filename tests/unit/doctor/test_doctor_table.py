"""What a person and a program read."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_opd.doctor.finding import failed, ok, skipped
from megatron_opd.doctor.table import as_plain, is_good, show

FINDINGS = [
    ok("data", "train.jsonl: 2,000 records"),
    failed("data", "a record [of three]: " + "words and words " * 40, "one object", "repair the line, " * 12),
    skipped("sinks", "all off"),
]


def test_eighty_columns_are_enough() -> None:
    out = io.StringIO()
    show(FINDINGS, Console(file=out, width=80))
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    told = "\n".join(lines)
    assert "[of three]" in told and "needed: one object" in told and "fix: repair the line," in told
    assert "(--json shows all)" in " ".join(told.split()) and told.endswith("1 ok, 1 failed, 1 skipped")
    assert sum(" data " in line for line in lines) == 1  # a check's name stands once


def test_a_program_gets_everything() -> None:
    plain = as_plain(FINDINGS)
    assert plain["ok"] is False and [one["state"] for one in plain["checks"]] == ["ok", "failed", "skipped"]
    assert plain["checks"][1]["found"] == FINDINGS[1].found
    assert is_good([FINDINGS[0], FINDINGS[2]]) and not is_good(FINDINGS)
