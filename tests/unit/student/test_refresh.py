"""What engines receive of a student under each layout, and what becomes of an engine that fails.

The trainer's side is real; the engines are real processes that keep what they are sent. The real SGLang is in
tests/contract.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from student_case import EXPERTS, LAYOUTS, MODELS, kinds_of, make_model

CASES = {
    "tp2": "broadcast",
    "pp2_virtual2": "broadcast",
    "tp2_pp2": "tensor",
    "dp2_overlap": "disk",
    "experts_ep2_tp2": "broadcast",
    "experts_ep2_pp2": "broadcast",
}
HEALTHY: dict[str, Any] = {}
BROADCAST = {"mode": "broadcast"}
STREAMS = {"streams": True, "at": 0}
FAULTS = {
    "well": {"engines": [HEALTHY, HEALTHY], **BROADCAST},
    "old": {"engines": [{"release": "0.5.20"}, HEALTHY], **BROADCAST},
    "refuses": {"engines": [{"fault": "refuse"}, HEALTHY], **BROADCAST},
    "flush_refused": {"engines": [{"fault": "flush"}, HEALTHY], **BROADCAST},
    "dies": {"engines": [{"fault": "die"}, HEALTHY], **BROADCAST},
    "hangs": {"engines": [{"fault": "hang"}, HEALTHY], **BROADCAST},
    "dies_joining": {"engines": [{"fault": "join"}, HEALTHY], **BROADCAST},
    "other_version": {"engines": [{"fault": "version"}, HEALTHY], **BROADCAST},
    "other_logprobs": {"engines": [{"fault": "logprobs"}, HEALTHY], **BROADCAST},
    "other_weights": {"engines": [{"checksum": "a"}, {"checksum": "b"}, HEALTHY], **BROADCAST},
    "paused": {"engines": [{"fault": "die"}, HEALTHY], **BROADCAST, "pause": "retract"},
    "only_dies": {"engines": [{"fault": "die"}], **BROADCAST, "back_after_s": 2.0},
    "only_gone": {"engines": [{"fault": "die"}], **BROADCAST, "recovery_s": 1},
    "only_wrong": {"engines": [{"fault": "logprobs"}], **BROADCAST},
    "stream": {"engines": [STREAMS, STREAMS], **BROADCAST, "replaced": False},
    "stream_refused": {"engines": [{**STREAMS, "fault": "refuse"}, STREAMS], **BROADCAST, "replaced": False},
    "stream_dies": {"engines": [{**STREAMS, "fault": "die"}, STREAMS], **BROADCAST, "replaced": False},
    "stream_hangs": {"engines": [{**STREAMS, "fault": "hang"}, STREAMS], **BROADCAST, "replaced": False},
    "half_streams": {"engines": [STREAMS, HEALTHY], **BROADCAST, "replaced": False},
    "file_refused": {"engines": [{"fault": "refuse", "at": 1}, HEALTHY], "mode": "disk"},
    "memory_refused": {"engines": [{"fault": "refuse"}, HEALTHY], "mode": "tensor"},
    "colocated": {"engines": [HEALTHY, HEALTHY, {"fault": "memory"}], "mode": "tensor", "colocated": True},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refresh")
    for kind in {kinds_of(layout)[0] for layout in CASES} | {"tied"}:
        assert kind in MODELS | EXPERTS
        make_model(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def layouts(work: Path) -> None:
    run_worker(work, "layouts", {name: (LAYOUTS[name], mode) for name, mode in CASES.items()})


@pytest.fixture(scope="module")
def faults(work: Path) -> dict[str, dict[str, Any]]:
    run_worker(work, "faults", FAULTS)
    return pickle.loads((work / "faults.pickle").read_bytes())


def run_worker(work: Path, kind: str, cases: dict[str, Any]) -> None:
    worker = str(Path(__file__).with_name("refresh_worker.py"))
    support = str(Path(__file__).parents[2] / "support")
    path = os.pathsep.join(filter(None, [support, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker, str(work), kind, json.dumps(cases)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]


def assert_equal_to_the_bit(folder: Path, model: Path, factor: float = 1.0) -> None:
    found, expected = load_file(folder / "received.safetensors"), load_file(model / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], factor * tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("layout", CASES)
def test_an_engine_receives_the_model_of_any_layout_to_the_bit(layouts: None, work: Path, layout: str) -> None:
    """Also what has changed since the first time, under Hugging Face names, without the padding."""
    model = work / kinds_of(layout)[0]
    assert_equal_to_the_bit(work / layout, model, factor=2.0)
    version, size, live, requests = json.loads((work / layout / "found.json").read_text())
    assert version == "4" and len(live) == 1
    assert size == sum(tensor.nbytes for tensor in load_file(model / "model.safetensors").values())
    if CASES[layout] == "broadcast":  # this engine takes streams: one request for what were up to 16 buckets
        first, second = requests
        assert first > 1 and second == -(-first // 16)


def test_old_versions_are_removed_when_the_new_one_is_taken(layouts: None, work: Path) -> None:
    assert [path.name for path in (work / "dp2_overlap" / "weights").iterdir()] == ["version_000004"]


@pytest.mark.parametrize(
    "name", ["well", "old", "refuses", "flush_refused", "only_dies", "file_refused", "memory_refused"]
)
def test_an_engine_that_is_well_in_the_end_is_live(faults: dict, work: Path, name: str) -> None:
    """Whoever says that it failed is sent everything again; the only engine is waited for."""
    found = faults[name]
    assert found["first"].live == tuple(found["urls"]) and found["first"].out == {}
    for number in range(len(found["urls"])):
        folder = work / (f"{name}-1" if name == "only_dies" else f"{name}-{number}")
        assert_equal_to_the_bit(folder, work / "tied")


@pytest.mark.parametrize("name", ["dies", "hangs", "dies_joining", "other_version", "other_logprobs", "paused"])
def test_an_engine_that_fails_is_out_and_the_others_go_on(faults: dict, work: Path, name: str) -> None:
    found = faults[name]
    bad, good = found["urls"]
    assert found["first"].live == (good,) and list(found["first"].out) == [bad]
    assert_equal_to_the_bit(work / f"{name}-1", work / "tied")


@pytest.mark.parametrize("name", ["dies", "hangs", "dies_joining", "other_version", "other_logprobs", "paused"])
def test_an_engine_that_was_started_again_is_live_after_the_next_refresh(faults: dict, name: str) -> None:
    found = faults[name]
    assert sorted(found["second"].live) == sorted(found["urls"]) and found["second"].out == {}


@pytest.mark.parametrize(
    ("name", "out", "fewer"),
    [
        ("stream", [], True),
        ("half_streams", [], False),
        ("stream_refused", [], True),
        ("stream_dies", [0], True),
        ("stream_hangs", [0], True),
    ],
)
def test_after_the_first_refresh_engines_that_can_take_a_stream(
    faults: dict, name: str, out: list[int], fewer: bool
) -> None:
    found, update = faults[name], "/update_weights_from_distributed"
    assert found["first"].live == tuple(found["urls"])
    assert list(found["second"].out) == [found["urls"][number] for number in out], found["second"].out
    before, both = (found[calls][1].count(update) for calls in ("calls", "later_calls"))
    assert (both - before < before) == fewer


def test_brackets_are_where_the_release_has_them(faults: dict) -> None:
    old, new = faults["old"]["calls"]
    assert old.count("/begin_weight_update") == old.count("/end_weight_update") == 0
    assert new.count("/begin_weight_update") == new.count("/end_weight_update") == 1


def test_requests_of_an_engine_with_wrong_weights_are_aborted(faults: dict) -> None:
    one, other, good = faults["other_weights"]["calls"]
    assert "/abort_request" in one and "/abort_request" in other and "/abort_request" not in good
    assert "/abort_request" in faults["flush_refused"]["calls"][0]


def test_engines_that_disagree_are_out_together(faults: dict) -> None:
    found = faults["other_weights"]
    one, other, third = found["urls"]
    assert found["first"].live == (third,) and set(found["first"].out) == {one, other}
    assert "different weights" in found["first"].out[one]


def test_a_paused_engine_goes_on_whatever_happens(faults: dict) -> None:
    good = faults["paused"]["calls"][1]
    assert good.count("/pause_generation") == good.count("/continue_generation") >= 2
    first = good.index("/continue_generation")
    assert "/update_weights_from_distributed" in good[good.index("/pause_generation") : first]


def test_an_only_engine_that_stays_away_stops_the_run(faults: dict) -> None:
    assert "RefreshError: No rollout engine can be reached" in faults["only_gone"]["error"]
    assert faults["only_gone"]["urls"][0] in faults["only_gone"]["error"]


def test_an_only_engine_with_other_log_probs_stops_the_run(faults: dict) -> None:
    assert "log-probs are not the trainer's" in faults["only_wrong"]["error"]


def test_colocated_engines_give_their_memory_back_and_take_it_again_once(faults: dict) -> None:
    """The first one is started again while its memory is lent: it holds all of it, and resuming that would end it."""
    found = faults["colocated"]
    first, steady, unknown = found["urls"]
    lent, later = found["calls"], found["later_calls"]
    assert found["first"].live == (first, steady, unknown)
    for calls in lent:
        asked = [path for path in calls if path not in ("/model_info", "/calls")]
        assert asked[-3:] == ["/abort_request", "/flush_cache", "/release_memory_occupation"]
    again = later[1][len(lent[1]) :]
    assert again.count("/resume_memory_occupation") == 1 and "/release_memory_occupation" not in again
    assert again.index("/resume_memory_occupation") < again.index("/update_weights_from_tensor")
    assert "/resume_memory_occupation" not in later[0] + later[2]
    assert found["second"].live == (first, steady)
    assert "not known what memory" in found["second"].out[unknown]


def test_engines_that_are_not_colocated_keep_their_memory(faults: dict) -> None:
    assert not [path for calls in faults["well"]["later_calls"] for path in calls if "memory" in path]
