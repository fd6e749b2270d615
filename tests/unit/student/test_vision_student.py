"""The multimodal student under each parallel layout against transformers, and against a slow one-process reference."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_case import next_logprobs, slow_step
from transformers import AutoModelForImageTextToText
from vision_case import KINDS, LAYOUTS, Seen, VisionReference, make_images, make_kind, make_samples

CASES = [(layout, kind) for layout, (_, kinds) in LAYOUTS.items() for kind in kinds]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one random model of each kind, its samples, and the images of all."""
    folder = tmp_path_factory.mktemp("vision")
    for kind in KINDS:
        images = make_images(folder / "images", make_kind(folder / kind, kind))
        seen = make_samples(VisionReference(folder / kind, folder / "images"), images)
        (folder / f"{kind}.samples").write_bytes(pickle.dumps(seen))
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> dict[str, dict[str, Any]]:
    """What each kind of model should give."""
    return {kind: expected_of(work, kind) for kind in KINDS}


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, dict[str, Any]]:
    """What the ranks of each layout computed."""
    support = Path(__file__).parents[2] / "support"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("vision_worker.py")), str(work)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {name: pickle.loads((work / f"{name}.pickle").read_bytes()) for name in LAYOUTS}


def samples_of(work: Path, kind: str) -> list[Seen]:
    return pickle.loads((work / f"{kind}.samples").read_bytes())


def expected_of(work: Path, kind: str) -> dict[str, Any]:
    seen = samples_of(work, kind)
    found: dict[str, Any] = {}
    for name, train_vision in (("frozen", False), ("learning", True)):
        model = VisionReference(work / kind, work / "images", train_vision=train_vision)
        for one in seen:
            model.know(one.sample.tokens, one.images)
        if not train_vision:
            with torch.no_grad():
                found["logprobs"] = [next_logprobs(model, one.sample.tokens).numpy() for one in seen]
        found[name] = slow_step(model, [one.sample for one in seen]) | {"all": model.weights()}
        with torch.no_grad():
            found[name]["after"] = next_logprobs(model, seen[2].sample.tokens).numpy()
    return found


@pytest.mark.parametrize(("layout", "kind"), CASES)
@pytest.mark.parametrize("way", ["alone", "packed"])
def test_logprobs_equal_transformers(runs: dict, reference: dict, layout: str, kind: str, way: str) -> None:
    """Text alone, and with one or several images of different sizes, in rows of their own and packed."""
    for found, expected in zip(runs[layout][kind][way], reference[kind]["logprobs"], strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_another_image_changes_what_comes_after_it_and_nothing_else(
    runs: dict, work: Path, layout: str, kind: str
) -> None:
    before, after = runs[layout][kind]["packed"], runs[layout][kind]["swapped"]
    start = samples_of(work, kind)[1].images[0].start
    changed = np.abs(before[1] - after[1])
    assert not changed[:start].any()
    assert (changed[start:] > 1e-4).all()
    for index in (0, 2, 3, 4):
        np.testing.assert_array_equal(before[index], after[index])


@pytest.mark.parametrize(("layout", "kind"), CASES)
@pytest.mark.parametrize("split", ["row_each", "one_row"])
def test_step_equals_slow_reference(runs: dict, reference: dict, layout: str, kind: str, split: str) -> None:
    """Gradients and updated weights of language model and tower; ranks without images take part too."""
    compare_step(runs[layout][kind][split], reference[kind]["learning"])


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_steps_in_turn_do_not_depend_on_the_layout(runs: dict, layout: str, kind: str) -> None:
    """Images are on another rank in the second step than in the first."""
    found, expected = (runs[name][kind]["after_two_steps"] for name in (layout, "tp1"))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=5e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_frozen_tower_stays_as_it_was(runs: dict, reference: dict, layout: str, kind: str) -> None:
    found, expected = runs[layout][kind]["frozen"], reference[kind]["frozen"]
    compare_step(found, expected)
    tower = expected["all"].keys() - expected["weights"].keys()
    assert len(tower) > 20
    for name in tower:
        assert torch.equal(found["weights"][name], expected["all"][name]), name


def compare_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["metrics"]["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert found["metrics"]["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    assert found["weights"].keys() == expected["all"].keys()
    for what in ("gradients", "weights"):
        for name, tensor in expected[what].items():
            torch.testing.assert_close(found[what][name], tensor, atol=1e-4, rtol=1e-4, msg=f"{what} of {name}")
    np.testing.assert_allclose(found["after"], expected["after"], atol=5e-4, rtol=0)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_export_is_equal_to_the_bit(runs: dict, work: Path, layout: str, kind: str) -> None:
    original, copy = (
        AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").state_dict()
        for folder in (work / kind, work / f"{kind}-{layout}")
    )
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[key], copy[key]) for key in original)


def test_towers_of_tensor_parallel_ranks_do_not_drift_apart(runs: dict, reference: dict) -> None:
    """The worker has compared the ranks; the mean of their gradients is the right one."""
    compare_step(runs["tp2"]["qwen3"]["drift"], reference["qwen3"]["learning"])


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_half_precision(runs: dict, reference: dict, layout: str, kind: str) -> None:
    """bfloat16 weights give nearly the same step."""
    half, expected = runs[layout][kind]["half"], reference[kind]["learning"]
    assert half["loss"] == pytest.approx(expected["loss"], abs=0.01)
    assert half["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.05)
