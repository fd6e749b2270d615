"""What a person sees: plain lines in a log, a bar on a terminal, and a table at the end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from megatron_opd.config import load_config
from megatron_opd.errors import EngineError
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.lines import banner_lines, duration, step_line
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
METRICS = {
    "loss/policy": -0.01,
    "opd/gap": -0.3,
    "reward/correct": 0.5,
    "balance/kept": 1.0,
    "calibration/mean_shift": 0.125,
    "rollout/length": 1234.5,
    "loss/grad_norm": 12.25,
    "time/collect_s": 100.0,
    "time/train_s": 2.0,
    "perf/tokens_per_s": 12345.6,
    "time/step_s": 61.0,
}


def show(tmp_path: Path, *, terminal: bool, width: int = 200) -> str:
    """The output of a small run."""
    output = io.StringIO()
    recorder = Recorder(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    recorder.event("evaluating", when="before", prompts=4)
    recorder.evaluated(0, "before", {"math": 0.25, "code": None}, {"math": 0.03, "code": None}, (0, 0))
    recorder.evaluated(2, "during", {"math": 0.5}, {"math": 0.1}, (2, 3))
    recorder.event("evaluation_skipped", step=3)
    recorder.step(1, METRICS | {"other": 1.0})
    recorder.event("sink_left", sink="wandb", reason="no [answer]")
    with RunConsole(Console(file=output, force_terminal=terminal, width=width, soft_wrap=True)) as console:
        console.banner(load_config(TOY, ["steps=2"]), RunDirectory(tmp_path / "[run]"))
        with (tmp_path / "events.jsonl").open() as events:
            console.show(events)
            console.show(events)
        console.result(SUMMARY, tmp_path)
        console.error(EngineError("It [failed]", got="3"))
    return output.getvalue()


def test_a_log_gets_plain_lines_once_each(tmp_path: Path) -> None:
    text = show(tmp_path, terminal=False)
    assert "\x1b" not in text and text.count("step 1/2 | loss -0.0100 | gap -0.300 | correct  50% | kept 100%") == 1
    assert "accuracy before: math 25.0 %  code not graded" in text
    assert "accuracy after step 2, weights 2 to 3: math 50.0 %" in text
    assert "warning: no evaluation after step 3: the one before still goes on" in text
    assert "warning: wandb gets no more numbers: no [answer]" in text
    assert "[run]" in text and "error: It [failed]\n  got:      3" in text  # not taken for markup
    assert "report    megatron-opd view" in text.split("error:")[1]


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    assert "1/2" in show(tmp_path, terminal=True) and "\x1b" in show(tmp_path, terminal=True)


def test_the_table_shows_every_domain_and_moment(tmp_path: Path) -> None:
    text = show(tmp_path, terminal=False)
    rows = [line for line in text.splitlines() if "math" in line or "code" in line]
    assert any(all(part in row for part in ("math", "25.0 % (3.0)", "50.0 % (4.0)", "90.0 % (1.0)")) for row in rows)
    assert any(all(part in row for part in ("code", "not graded", "75.0 % (2.0)")) for row in rows)


def test_lines_of_steps_are_aligned_and_fit_the_terminal() -> None:
    config = load_config(TOY, ["steps=500"])
    other = {name: value / 10 for name, value in METRICS.items()} | {"order/auc": 0.5}
    lines = [step_line(1, METRICS, config, 61.0), step_line(500, other, config, 100000.0)]
    assert lines[0].startswith("step   1/500 | ") and lines[0].endswith("eta   1m01s") and "auc  n/a" in lines[0]
    assert len({tuple(i for i, letter in enumerate(line) if letter == "|") for line in lines}) == 1
    for width in (80, 100, 120):
        line = step_line(1, METRICS, config, 61.0, width)
        assert width - 30 < len(line) <= width and "loss" in line and "correct" in line and "eta" in line
    plain = step_line(1, METRICS, load_config(TOY, ["calibration=null", "balance=null"]), None)
    assert "shift" not in plain and "kept" not in plain and "eta" not in plain


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1m00s"), (3725, "1h02m"), (266400, "3d02h")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_banner_names_the_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunDirectory(tmp_path)
    (tmp_path / "run.json").write_text('{"id": "abc"}')
    lines = banner_lines(load_config(TOY, ["sinks.wandb=true", "sinks.tensorboard=true"]), run)
    assert any("tensorboard --logdir" in line for line in lines)
    assert any("run abc, offline" in line for line in lines) and any("wandb sync" in line for line in lines)


def test_a_log_tells_of_a_wait_once_it_is_long_and_then_when_it_has_doubled(tmp_path: Path) -> None:
    output = io.StringIO()
    with RunConsole(Console(file=output, width=200)) as console:
        console.banner(load_config(TOY, []), RunDirectory(tmp_path))
        output.seek(0)
        output.truncate()
        for second in range(45):
            console.waiting(["rollout", "teacher-math"] if second < 30 else ["rollout"], float(second))
        console.waiting([], 46.0)
        Activity(tmp_path / "activity.json").begin("evaluating", 10)
        console.waiting([], 47.0)  # has just begun
    assert output.getvalue().splitlines() == [
        *(f"waiting for rollout, teacher-math: {second} s, of at most 10m00s" for second in (5, 10, 20)),
        "waiting for rollout: 40 s, of at most 10m00s",
        "waiting for the student's first weights: 46 s, since the start",
    ]


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
