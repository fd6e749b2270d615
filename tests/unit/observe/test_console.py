"""What a person sees: plain lines in a log, a bar on a terminal, and a table at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

from rich.console import Console

from megatron_opd.config import load_config
from megatron_opd.errors import EngineError
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.recorder import Recorder, follow, read_events, tell_failures
from megatron_opd.runtime.rundir import RunDirectory

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
SUMMARY = {
    "steps": 2,
    "wall_s": 61.7,
    "tokens": {"generated": 10, "scored": 8, "trained": 7},
    "eval": {
        "before": {"math": 0.25, "code": None},
        "after": {"math": 0.5, "code": 0.75},
        "teacher": {"math": 0.9},
        "standard_error": {
            "before": {"math": 0.03, "code": None},
            "after": {"math": 0.04, "code": 0.02},
            "teacher": {"math": 0.01},
        },
    },
}


def show(tmp_path: Path, *, terminal: bool) -> str:
    """The output of a small run."""
    output = io.StringIO()
    recorder = Recorder(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    recorder.event("evaluating", when="before", prompts=4)
    recorder.event("evaluated", when="before", accuracy={"math": 0.25, "code": None})
    recorder.step(1, {"loss/policy": -0.01, "opd/gap": -0.3, "reward/correct": 0.5, "other": 1.0})
    with RunConsole(Console(file=output, force_terminal=terminal, width=200)) as console:
        console.banner(load_config(TOY, ["steps=2"]), RunDirectory(tmp_path / "[run]"))
        with (tmp_path / "events.jsonl").open() as events:
            console.show(events)
            console.show(events)
        console.result(SUMMARY, tmp_path)
        console.error(EngineError("It [failed]", got="3"))
    return output.getvalue()


def test_a_log_gets_plain_lines_once_each(tmp_path: Path) -> None:
    text = show(tmp_path, terminal=False)
    assert "\x1b" not in text and text.count("step 1/2 | loss -0.0100 | gap -0.300 | correct 50%") == 1
    assert "accuracy before: math 25.0 %  code not graded" in text
    assert "[run]" in text and "error: It [failed]\n  got:      3" in text  # not taken for markup


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    assert "1/2" in show(tmp_path, terminal=True) and "\x1b" in show(tmp_path, terminal=True)


def test_the_table_shows_every_domain_and_moment(tmp_path: Path) -> None:
    text = show(tmp_path, terminal=False)
    rows = [line for line in text.splitlines() if "math" in line or "code" in line]
    assert any(all(part in row for part in ("math", "25.0 % (3.0)", "50.0 % (4.0)", "90.0 % (1.0)")) for row in rows)
    assert any(all(part in row for part in ("code", "not graded", "75.0 % (2.0)")) for row in rows)


def test_a_line_that_is_still_being_written_waits(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "a"}\n{"event"')
    with path.open() as file:
        assert [event["event"] for event in follow(file)] == ["a"]
        assert list(follow(file)) == []
        with path.open("a") as more:
            more.write(': "b"}\n')
        assert [event["event"] for event in follow(file)] == ["b"]


def test_a_failure_is_left_for_the_supervisor(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    try:
        with tell_failures("student", recorder):
            raise EngineError("no answer", where="there")
    except EngineError:
        (event,) = read_events(tmp_path / "events.jsonl")
    assert (event["event"], event["role"]) == ("failed", "student") and "there" in event["error"]
    assert json.loads((tmp_path / "events.jsonl").read_text()) == event
