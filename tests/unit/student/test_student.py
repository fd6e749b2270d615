"""The student under each parallel layout against transformers, and against a slow single-process reference."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from student_case import (
    EXPERTS,
    LAYOUTS,
    MODELS,
    SCORED_ONLY,
    denominator_of,
    kinds_of,
    make_model,
    make_samples,
    next_logprobs,
    slow_reference,
)
from transformers import AutoModelForCausalLM

SPLITS = ("one_row", "row_each", "mixed")
CASES = [(layout, kind) for layout in LAYOUTS for kind in kinds_of(layout)]
TRAINED = [(layout, kind) for layout, kind in CASES if kind not in SCORED_ONLY]
FIRST = [(layout, kinds_of(layout)[0]) for layout in LAYOUTS]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one random model of each kind and its samples."""
    folder = tmp_path_factory.mktemp("student")
    for kind in MODELS | EXPERTS:
        make_model(folder / kind, kind)
        (folder / f"{kind}.samples").write_bytes(pickle.dumps(make_samples(load(folder / kind))))
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> dict[str, dict[str, Any]]:
    """What each kind of model should give."""
    found = {}
    for kind in MODELS | EXPERTS:
        samples = samples_of(work, kind)
        with torch.no_grad():
            model = load(work / kind)
            found[kind] = {"logprobs": [next_logprobs(model, sample.tokens).numpy() for sample in samples]}
        if kind not in SCORED_ONLY:
            found[kind] |= slow_reference(work / kind, samples)
    return found


@pytest.fixture(scope="module")
def runs(work: Path) -> dict[str, dict[str, Any]]:
    """What the ranks of each layout computed."""
    worker = str(Path(__file__).with_name("student_worker.py"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker, str(work), json.dumps(LAYOUTS)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return {name: pickle.loads((work / f"{name}.pickle").read_bytes()) for name in LAYOUTS}


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def samples_of(work: Path, kind: str) -> list[Any]:
    return pickle.loads((work / f"{kind}.samples").read_bytes())


@pytest.mark.parametrize(("layout", "kind"), CASES)
@pytest.mark.parametrize("way", ["alone", "packed"])
def test_logprobs_equal_transformers(runs: dict, reference: dict, layout: str, kind: str, way: str) -> None:
    for found, expected in zip(runs[layout][kind][way], reference[kind]["logprobs"], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_every_array_reaches_the_loss_where_it_was(runs: dict, layout: str, kind: str) -> None:
    """Position-coded values, cut for context parallelism and carried to the last pipeline stage."""
    assert runs[layout][kind]["misplaced"] == []


@pytest.mark.parametrize(("layout", "kind"), FIRST)
def test_backend_says_why(runs: dict, layout: str, kind: str) -> None:
    assert runs[layout][kind]["backend"] == ("torch", "Transformer Engine needs a GPU")
    assert "transformer_engine, but Transformer Engine needs a GPU" in runs[layout]["demand"]["backend"]
    assert "e4m3, but Transformer Engine needs a GPU" in runs[layout]["demand"]["fp8"]


@pytest.mark.parametrize(("layout", "kind"), TRAINED)
@pytest.mark.parametrize("split", SPLITS)
def test_step_equals_slow_reference(runs: dict, reference: dict, layout: str, kind: str, split: str) -> None:
    """Loss, gradients and updated weights depend neither on the layout nor on how samples are packed."""
    found, expected = runs[layout][kind][split], reference[kind]
    metrics = found["metrics"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5)
    assert metrics["learning_rate"] == 1e-2
    for what in ("gradients", "weights"):
        assert found[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            torch.testing.assert_close(found[what][name], tensor, atol=1e-5, rtol=0, msg=f"{what} of {name}")


@pytest.mark.parametrize(("layout", "kind"), FIRST)
@pytest.mark.parametrize("split", SPLITS)
def test_metrics_are_weighted_means(
    runs: dict, work: Path, reference: dict, layout: str, kind: str, split: str
) -> None:
    metrics = runs[layout][kind][split]["metrics"]
    samples = samples_of(work, kind)
    weights = np.concatenate([sample.weights[:-1] for sample in samples])
    advantages = np.concatenate([sample.advantages[:-1] for sample in samples])
    behaviour = np.concatenate([sample.behaviour[:-1] for sample in samples])
    changes = np.concatenate(reference[kind]["logprobs"]) - behaviour
    stale = np.concatenate([sample.lags[:-1] for sample in samples]) > 0
    slopes = np.concatenate([sample.slopes[:-1] for sample in samples])
    now = np.where(stale, advantages - slopes * changes, advantages)
    ratios = np.exp(changes)
    clipped = ~stale & (((ratios > 1.28) & (advantages > 0)) | ((ratios < 0.8) & (advantages < 0)))
    total = denominator_of(samples)
    assert 0.1 < metrics["clipped_share"] < 0.9  # the case covers both
    assert metrics["advantage"] == pytest.approx((weights * now).sum() / total, abs=1e-5)
    assert metrics["abs_advantage"] == pytest.approx((weights * np.abs(now)).sum() / total, abs=1e-5)
    assert metrics["clipped_share"] == pytest.approx((weights * clipped).sum() / total, abs=1e-5)
    fresh, old = weights * ~stale, weights * stale
    assert metrics["abs_logprob_change"] == pytest.approx((fresh * np.abs(changes)).sum() / fresh.sum(), abs=1e-5)
    assert metrics["stale_share"] == pytest.approx(old.sum() / total, abs=1e-5)
    assert metrics["importance_weight"] == pytest.approx((old * np.minimum(ratios, 2.0)).sum() / old.sum(), abs=1e-5)
    assert metrics["truncated_share"] == pytest.approx((old * (ratios > 2.0)).sum() / old.sum(), abs=1e-5)


@pytest.mark.parametrize(("layout", "kind"), TRAINED)
def test_non_finite_step_changes_nothing(runs: dict, layout: str, kind: str) -> None:
    refused = runs[layout][kind]["refused"]
    assert refused["unchanged"]
    assert "loss is not finite" in refused["messages"]["loss"]
    assert "norm of the gradient is not finite" in refused["messages"]["gradient"]
    assert "training step 3" in refused["messages"]["loss"]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_export_is_equal_to_the_bit(runs: dict, work: Path, layout: str, kind: str) -> None:
    exported = work / f"{kind}-{layout}"
    original, copy = load(work / kind).state_dict(), load(exported).state_dict()
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[key], copy[key]) for key in original)
    shards = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(shards) == 7 if kind == "llama" else shards == ["model.safetensors"], shards
    assert (exported / "chat_template.jinja").is_file()
    assert (exported / "tokenizer_config.json").is_file()
    assert not list(work.glob("*.partial"))


@pytest.mark.parametrize(("layout", "kind"), FIRST)
def test_half_precision(runs: dict, work: Path, reference: dict, layout: str, kind: str) -> None:
    """bfloat16 weights give nearly the same step, and are exported as such."""
    half = runs[layout]["half"]
    assert half["loss"] == pytest.approx(reference[kind]["loss"], abs=0.01)
    assert half["grad_norm"] == pytest.approx(reference[kind]["grad_norm"], rel=0.02)
    assert load(work / f"half-{layout}").dtype == torch.bfloat16
