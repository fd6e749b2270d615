"""Sinks never stop or delay a run: slow, hanging, raising and missing ones; the real libraries where installed."""

from __future__ import annotations

import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_opd.config import SinksConfig, load_config
from megatron_opd.errors import ConfigError
from megatron_opd.observe import sinks
from megatron_opd.observe.recorder import Recorder, read_events
from megatron_opd.observe.sinks import SinkThread, check_sinks, open_sinks
from megatron_opd.runtime.rundir import Endpoints, RunDirectory

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"
ENDPOINTS = Endpoints("http://c", "http://r", {}, None, "127.0.0.1", 1)
NEVER = threading.Event()


class Kept:
    """A sink that keeps what it gets, and does what it is told to at a step or at its end."""

    def __init__(self, at_step: object = None, at_end: object = None) -> None:
        self.steps: list[int] = []
        self.closed = False
        self._at_step, self._at_end = at_step, at_end

    def step(self, step: int, metrics: dict[str, float]) -> None:
        if self._at_step:
            self._at_step()
        self.steps.append(step)

    def close(self) -> None:
        if self._at_end:
            self._at_end()
        self.closed = True


def fail() -> None:
    raise ConnectionError("the service said no")


def hang() -> None:
    NEVER.wait()


def started(sink: Kept, patience_s: float = 30.0) -> tuple[SinkThread, list[str]]:
    told: list[str] = []
    return SinkThread("kept", lambda: sink, told.append, patience_s), told


def test_a_sink_gets_every_step_in_order_and_its_end() -> None:
    sink = Kept()
    thread, told = started(sink)
    for step in range(100):
        thread.step(step, {"opd/gap": 1.0})
    assert thread.close() and sink.steps == list(range(100)) and sink.closed and told == []


@pytest.mark.parametrize("sink", [Kept(at_step=fail), Kept(at_end=fail)], ids=["at a step", "at its end"])
def test_one_that_raises_is_told_once_and_left(sink: Kept) -> None:
    thread, told = started(sink)
    thread.step(1, {})
    assert thread.close()
    thread.step(2, {})
    assert told == ["ConnectionError: the service said no"] and 2 not in sink.steps


def test_one_that_cannot_be_opened_is_told() -> None:
    told: list[str] = []
    thread = SinkThread("none", fail, told.append, 30.0)
    assert thread.close() and told == ["ConnectionError: the service said no"]


@pytest.mark.parametrize("sink", [Kept(at_step=hang), Kept(at_end=hang)], ids=["at a step", "at its end"])
def test_one_that_hangs_is_left_at_the_end(sink: Kept) -> None:
    thread, told = started(sink, patience_s=0.2)
    thread.step(1, {})
    assert not thread.close() and len(told) == 1 and told[0].endswith("0.2 s")


def test_one_that_hangs_is_left_while_the_run_goes_on() -> None:
    sink = Kept(at_step=hang)
    thread, told = started(sink, patience_s=0.1)
    thread.step(1, {})
    thread._thread.join(0.3)
    thread.step(2, {})
    assert told == ["it has not answered for 0.1 s"]


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "WAITING_STEPS", 5)
    thread, told = started(Kept(at_step=hang))
    for step in range(20):
        thread.step(step, {})
    assert told == ["5 steps wait for it"]


def test_a_process_ends_though_a_library_hangs_at_exit(tmp_path: Path) -> None:
    code = f"""
import atexit, threading, time
from pathlib import Path
from megatron_opd.config import load_config
from megatron_opd.observe import sinks
from megatron_opd.observe.recorder import Recorder
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
class Hangs:
    def __init__(self, run):
        atexit.register(time.sleep, 1000)
        time.sleep(1000)
sinks.TensorBoard = Hangs
config = load_config(Path({str(TOY)!r}), ["output={tmp_path}", "sinks.tensorboard=true", "sinks.patience_s=0.3"])
run = RunDirectory.create(config, Endpoints("c", "r", {{}}, None, "h", 1))
with sinks.open_sinks(config, run, Recorder(run.events, run.metrics)):
    pass
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    (event,) = read_events(tmp_path / "toy" / "events.jsonl")
    assert (event["event"], event["sink"]) == ("sink_left", "tensorboard")


def test_a_library_that_is_missing_is_told_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "find_spec", lambda name: None)
    check_sinks(SinksConfig())
    with pytest.raises(ConfigError, match="not installed") as caught:
        check_sinks(SinksConfig(wandb=True, tensorboard=True))
    assert "sinks.wandb, sinks.tensorboard" in str(caught.value)


def test_tensorboard_shows_each_step_once_after_a_resumption(tmp_path: Path) -> None:
    if find_spec("tensorboard") is None:
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = logged(tmp_path, "sinks.tensorboard=true")
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/policy")] == [(1, 1), (2, 2), (3, 3), (4, 4)]


def test_wandb_keeps_the_runs_id_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = logged(tmp_path, "sinks.wandb=true")
    assert len(list((run.path / "wandb").glob(f"offline-run-*-{run.identity()}"))) == 2


def logged(tmp_path: Path, override: str) -> RunDirectory:
    """A run of three steps that goes on from its second one up to its fourth; no sink was left."""
    config = load_config(TOY, [f"output={tmp_path}", override])
    run = RunDirectory.create(config, ENDPOINTS)
    for begin, end in ((0, 3), (2, 4)):
        run.start(config, ENDPOINTS, begin)
        recorder = Recorder(run.events, run.metrics)
        with open_sinks(config, run, recorder):
            for step in range(begin + 1, end + 1):
                recorder.step(step, {"loss/policy": float(step)})
    assert {event["event"] for event in read_events(run.events)} == {"step"}
    return run
