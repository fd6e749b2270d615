"""What one layout saved, every other layout loads: weights, moments and the next step; and how saves fail."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from student_case import make_model, make_samples
from transformers import AutoModelForCausalLM

LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "dp2": {"data_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(folder / "untied", "untied")
    model = AutoModelForCausalLM.from_pretrained(folder / "untied", dtype="auto")
    (folder / "untied.samples").write_bytes(pickle.dumps(make_samples(model)))
    return folder


@pytest.fixture(scope="module")
def results(work: Path) -> dict[str, dict[str, Any]]:
    """What the ranks of each layout saved and loaded. All run at once: each waits for what the others save."""
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(start_ranks(work, name, sizes)) for name, sizes in LAYOUTS.items()}
        try:
            failed = [name for name, process in started.items() if process.wait(timeout=200)]
        finally:
            for process in started.values():
                process.terminate()
    assert not failed, "".join((work / f"{name}.log").read_text()[-6000:] for name in failed)
    return {name: pickle.loads((work / f"{name}.pickle").read_bytes()) for name in LAYOUTS}


def start_ranks(work: Path, name: str, sizes: dict[str, Any]) -> subprocess.Popen:
    ranks = 2 if sizes else 1
    worker = str(Path(__file__).with_name("checkpoint_worker.py"))
    launcher = ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    with (work / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *launcher, worker, str(work), name, json.dumps(sizes), json.dumps(list(LAYOUTS))],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.parametrize("under", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_what_is_loaded_is_what_was_saved(results: dict, saved: str, under: str) -> None:
    """To the bit, although training went on while the copy was being written; the next step is the same one."""
    expected, found = results[saved]["saved"], results[under][saved]
    assert math.prod(found["layout"].values()) == (1 if saved == "tp1" else 2)
    for what in ("weights", "exp_avg", "exp_avg_sq"):
        assert found[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            assert torch.equal(found[what][name], tensor), f"{what} of {name}"
    exact = saved == under
    assert found["next"] == (expected["next"] if exact else pytest.approx(expected["next"], abs=1e-5))
    for name, tensor in expected["after"].items():
        torch.testing.assert_close(found["after"][name], tensor, atol=0 if exact else 1e-5, rtol=0, msg=name)


def test_the_step_counts_on_and_the_schedule_goes_on(results: dict) -> None:
    rates = [results["tp1"]["tp1"]["next"]["learning_rate"], results["tp1"]["saved"]["next"]["learning_rate"]]
    assert rates[0] == rates[1] == pytest.approx(1e-2 - 2 / 10 * (1e-2 - 1e-3))  # linear from 1e-2 to 1e-3 in 10 steps


@pytest.mark.parametrize("layout", LAYOUTS)
def test_random_states_come_back_under_their_own_layout(results: dict, layout: str) -> None:
    assert torch.equal(results[layout][layout]["random"], results[layout]["saved"]["random"])


def test_a_save_that_fails_is_told_and_the_one_before_stays(results: dict, work: Path) -> None:
    events = results["tp2"]["events"]
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


def test_a_save_says_what_it_cost(results: dict) -> None:
    (event,) = [event for event in results["dp2"]["events"] if event["event"] == "checkpoint"]
    assert event["bytes"] > 500_000 and 0 < event["waited_s"] <= event["seconds"] < 30
