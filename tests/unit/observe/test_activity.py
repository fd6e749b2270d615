"""What a run does right now, and the moments of a step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_opd.observe import activity as module
from megatron_opd.observe.activity import Activity, Doing, read_activity
from megatron_opd.observe.recorder import Recorder, read_events
from megatron_opd.observe.timeline import GROUPS_SHOWN, record_timeline


def test_it_is_read_as_it_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WRITE_EVERY_S", 0.0)
    file = tmp_path / "activity.json"
    assert read_activity(file) is None
    activity = Activity(file)
    activity.begin("evaluating", 3)
    activity.advance()
    doing = read_activity(file)
    assert (doing.what, doing.done, doing.total) == ("evaluating", 1, 3)
    activity.begin("training")
    assert (read_activity(file).what, read_activity(file).done, read_activity(file).left_s) == ("training", 0, None)


def test_it_is_not_written_for_each_response(tmp_path: Path) -> None:
    file = tmp_path / "activity.json"
    activity = Activity(file)
    activity.begin("evaluating", 1000)
    first = file.stat().st_ino
    for _ in range(20):
        activity.advance()
    assert file.stat().st_ino == first or read_activity(file).done > 1


def test_the_rest_is_estimated_from_the_speed_so_far() -> None:
    assert Doing("x", 2, 10, began=100.0, now=104.0).left_s == 16.0
    assert Doing("x", 10, 10, began=100.0, now=104.0).left_s == 0.0
    assert Doing("x", 0, 10, began=100.0, now=104.0).left_s is None
    assert Doing("x", 12, 10, began=100.0, now=104.0).left_s is None  # more than was planned, by refills


def test_a_timeline_counts_from_its_beginning_and_is_bounded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "events.jsonl", tmp_path / "metrics.jsonl")
    groups = [tuple(500.0 + np.array([0, 1, 2, 2, 3]) * (1 + number)) for number in range(1000)]
    record_timeline(recorder, 3, groups, began=500.0, offered=504.0, live=510.0, train_s=4.0, refresh_s=1.5)
    record_timeline(recorder, 4, [], began=500.0, offered=500.0, live=501.0, train_s=1.0, refresh_s=0.0)
    found, empty = read_events(tmp_path / "events.jsonl")
    assert (found["step"], found["all_groups"], len(found["groups"])) == (3, 1000, GROUPS_SHOWN)
    assert found["groups"][0] == [0, 1, 2, 2, 3] and found["groups"][-1][-1] == 3000  # first and last to be ready
    assert (found["offered"], found["trained"], found["live"]) == (4.0, [4.5, 8.5], 10.0)
    assert empty["groups"] == []
