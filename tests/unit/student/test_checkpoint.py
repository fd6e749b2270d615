"""What one layout saved, others load: weights, moments and the next step; and how saves fail."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import student_case
import torch
from student_case import make_model, make_samples
from transformers import AutoModelForCausalLM

DENSE = ["tp1", "tp2", "dp2", "pp2", "cp2", "tp2_cp2", "pp2_virtual2"]
MIXTURE = ["experts_1", "experts_ep2", "experts_ep2_dp4", "experts_cp2_ep2", "experts_ep2_tp2", "experts_ep2_tp2_etp1"]
# The last: a copy of each expert on two ranks.
KNOWN = student_case.LAYOUTS | {"experts_ep2_dp4": {"data_parallel": 4, "expert_parallel": 2}}
LAYOUTS = {name: KNOWN[name] for name in [*DENSE, *MIXTURE]}
# Whose checkpoints each layout loads: its own, those of one process, and those of the layout before; one process: all.
LOADS = {
    under: names if number == 0 else list(dict.fromkeys([under, names[0], names[number - 1]]))
    for names in (DENSE, MIXTURE)
    for number, under in enumerate(names)
}
LOADS["tp2"].append("cp2")
LOADS["pp2"].append("pp2_virtual2")
LOADS["pp2_virtual2"].append("pp2")
PAIRS = [(saved, under) for under, names in LOADS.items() for saved in names]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    for kind in ("untied", "experts"):
        make_model(folder / kind, kind)
        model = AutoModelForCausalLM.from_pretrained(folder / kind, dtype="auto")
        (folder / f"{kind}.samples").write_bytes(pickle.dumps(make_samples(model)))
    return folder


@pytest.fixture(scope="module")
def done(work: Path) -> None:
    """Every layout has saved, and then loaded."""
    worker = str(Path(__file__).with_name("checkpoint_worker.py"))
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", worker, str(work), json.dumps(LAYOUTS), json.dumps(LOADS)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-8000:]


@pytest.fixture(scope="module")
def saved(work: Path, done: None) -> dict[str, dict[str, Any]]:
    """What the ranks of each layout had when they saved, and did afterwards."""
    return {name: pickle.loads((work / f"{name}.saved").read_bytes()) for name in LAYOUTS}


@pytest.fixture(scope="module")
def loaded(work: Path, done: None) -> dict[str, dict[str, Any]]:
    """What they loaded of each other, and did afterwards."""
    return {name: pickle.loads((work / f"{name}.loaded").read_bytes()) for name in LAYOUTS}


@pytest.mark.parametrize(("by", "under"), PAIRS)
def test_what_is_loaded_is_what_was_saved(saved: dict, loaded: dict, by: str, under: str) -> None:
    """To the bit, although training went on while the copy was being written; the next step is the same one."""
    expected, found = saved[by], loaded[under][by]
    for what in ("weights", "exp_avg", "exp_avg_sq"):
        assert found[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            assert torch.equal(found[what][name], tensor), f"{what} of {name}"
    exact = by == under
    assert found["next"]["loss"] == pytest.approx(expected["next"]["loss"], abs=0 if exact else 1e-6)
    assert found["next"] == (expected["next"] if exact else pytest.approx(expected["next"], abs=1e-5))
    for name, tensor in expected["after"].items():
        torch.testing.assert_close(found["after"][name], tensor, atol=0 if exact else 1e-5, rtol=0, msg=name)


def test_the_layout_is_told(loaded: dict) -> None:
    sizes = {"tensor": 2, "pipeline": 1, "context": 1, "data": 2, "expert": 2}
    assert loaded["experts_1"]["experts_ep2_tp2"]["layout"] == sizes
    assert loaded["tp1"]["tp2_cp2"]["layout"] == sizes | {"context": 2, "data": 1, "expert": 1}


def test_the_step_counts_on_and_the_schedule_goes_on(saved: dict, loaded: dict) -> None:
    rates = [loaded["tp1"]["tp1"]["next"]["learning_rate"], saved["tp1"]["next"]["learning_rate"]]
    assert rates[0] == rates[1] == pytest.approx(1e-2 - 2 / 10 * (1e-2 - 1e-3))  # linear from 1e-2 to 1e-3 in 10 steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_states_come_back_under_their_own_layout(saved: dict, loaded: dict, layout: str) -> None:
    assert torch.equal(loaded[layout][layout]["random"], saved[layout]["random"])


def test_a_save_that_fails_is_told_and_the_one_before_stays(saved: dict, work: Path) -> None:
    events = saved["tp2"]["events"]
    told = {event["step"]: event["error"] for event in events if event["event"] == "checkpoint_failed"}
    assert set(told) == {3, 4, 5, 6}
    assert "rank 1: OSError: [Errno 28] No space left on device" in told[3]
    assert "after checkpoint.deadline_s = 1 s " in told[4] and "rank 1 was still writing" in told[4]
    assert "the coordinator had not left its state" in told[5]
    assert "NotADirectoryError" in told[6] or "FileExistsError" in told[6]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [2, 7]
    folder = work / "tp2" / "checkpoints"
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["iter_0000002", "iter_0000007", "latest_checkpointed_iteration.txt"]
    assert (folder / left[-1]).read_text() == "7\n"


def test_a_save_says_what_it_cost(saved: dict) -> None:
    (event,) = [event for event in saved["dp2"]["events"] if event["event"] == "checkpoint"]
    assert event["bytes"] > 500_000 and 0 < event["waited_s"] <= event["seconds"] < 30
