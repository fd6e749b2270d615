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
from student_case import MODELS, denominator_of, make_model, make_samples, next_logprobs, slow_reference
from transformers import AutoModelForCausalLM

LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "tp2_sequence": {"tensor_parallel": 2, "sequence_parallel": True},
    "dp2": {"data_parallel": 2},
    "dp2_overlap": {"data_parallel": 2, "overlap_gradients": True, "overlap_parameters": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2_virtual2": {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "full"},
    "cp2": {"context_parallel": 2, "recompute": "selective"},
    "pp2_cp2": {"pipeline_parallel": 2, "context_parallel": 2},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2_cp2": {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    "dp2_tp2": {"data_parallel": 2, "tensor_parallel": 2},
}
SPLITS = ("one_row", "row_each", "mixed")
TRAINED = ("untied", "tied")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with one random model of each kind and its samples."""
    folder = tmp_path_factory.mktemp("student")
    for kind in MODELS:
        make_model(folder / kind, kind)
        (folder / f"{kind}.samples").write_bytes(pickle.dumps(make_samples(load(folder / kind))))
    return folder


@pytest.fixture(scope="module")
def reference(work: Path) -> dict[str, dict[str, Any]]:
    """What each kind of model should give."""
    found = {}
    for kind in MODELS:
        samples = samples_of(work, kind)
        with torch.no_grad():
            model = load(work / kind)
            found[kind] = {"logprobs": [next_logprobs(model, sample.tokens).numpy() for sample in samples]}
        if kind in TRAINED:
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


@pytest.fixture(scope="module", params=LAYOUTS)
def layout(request: pytest.FixtureRequest, runs: dict[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """Name of a layout and what its ranks computed."""
    return request.param, runs[request.param]


def load(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def samples_of(work: Path, kind: str) -> list[Any]:
    return pickle.loads((work / f"{kind}.samples").read_bytes())


def test_logprobs_equal_transformers(layout: tuple, reference: dict) -> None:
    _, result = layout
    for kind in MODELS:
        for way in ("alone", "packed"):
            for found, expected in zip(result[kind][way], reference[kind]["logprobs"], strict=True):
                np.testing.assert_allclose(found, expected, atol=1e-5, rtol=0, err_msg=f"{kind} {way}")


@pytest.mark.parametrize("kind", MODELS)
def test_every_array_reaches_the_loss_where_it_was(layout: tuple, kind: str) -> None:
    """Position-coded values, cut for context parallelism and carried to the last pipeline stage."""
    assert layout[1][kind]["misplaced"] == []


def test_backend_says_why(layout: tuple) -> None:
    _, result = layout
    assert result["untied"]["backend"] == ("torch", "Transformer Engine needs a GPU")
    assert "transformer_engine, but Transformer Engine needs a GPU" in result["demand"]


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("split", SPLITS)
def test_step_equals_slow_reference(layout: tuple, reference: dict, kind: str, split: str) -> None:
    """Loss, gradients and updated weights depend neither on the layout nor on how samples are packed."""
    _, result = layout
    found, expected = result[kind][split], reference[kind]
    metrics = found["metrics"]
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(expected["grad_norm"], abs=1e-5)
    assert metrics["learning_rate"] == 1e-2
    for what in ("gradients", "weights"):
        assert found[what].keys() == expected[what].keys()
        for name, tensor in expected[what].items():
            torch.testing.assert_close(found[what][name], tensor, atol=1e-5, rtol=0, msg=f"{what} of {name}")


@pytest.mark.parametrize("split", SPLITS)
def test_metrics_are_weighted_means(layout: tuple, work: Path, reference: dict, split: str) -> None:
    _, result = layout
    metrics = result["untied"][split]["metrics"]
    samples = samples_of(work, "untied")
    weights = np.concatenate([sample.weights[:-1] for sample in samples])
    advantages = np.concatenate([sample.advantages[:-1] for sample in samples])
    behaviour = np.concatenate([sample.behaviour[:-1] for sample in samples])
    changes = np.concatenate(reference["untied"]["logprobs"]) - behaviour
    ratios = np.exp(changes)
    clipped = ((ratios > 1.28) & (advantages > 0)) | ((ratios < 0.8) & (advantages < 0))
    total = denominator_of(samples)
    assert 0.1 < metrics["clipped_share"] < 0.9  # the case covers both
    assert metrics["advantage"] == pytest.approx((weights * advantages).sum() / total, abs=1e-5)
    assert metrics["abs_advantage"] == pytest.approx((weights * np.abs(advantages)).sum() / total, abs=1e-5)
    assert metrics["clipped_share"] == pytest.approx((weights * clipped).sum() / total, abs=1e-5)
    assert metrics["abs_logprob_change"] == pytest.approx((weights * np.abs(changes)).sum() / total, abs=1e-5)


@pytest.mark.parametrize("kind", TRAINED)
def test_non_finite_step_changes_nothing(layout: tuple, kind: str) -> None:
    _, result = layout
    refused = result[kind]["refused"]
    assert refused["unchanged"]
    assert "loss is not finite" in refused["messages"]["loss"]
    assert "norm of the gradient is not finite" in refused["messages"]["gradient"]
    assert "training step 3" in refused["messages"]["loss"]


@pytest.mark.parametrize("kind", MODELS)
def test_export_is_equal_to_the_bit(layout: tuple, work: Path, kind: str) -> None:
    name, _ = layout
    exported = work / f"{kind}-{name}"
    original, copy = load(work / kind).state_dict(), load(exported).state_dict()
    assert original.keys() == copy.keys()
    assert all(torch.equal(original[key], copy[key]) for key in original)
    shards = sorted(path.name for path in exported.glob("*.safetensors"))
    assert len(shards) == 6 if kind == "llama" else shards == ["model.safetensors"], shards
    assert (exported / "chat_template.jinja").is_file()
    assert (exported / "tokenizer_config.json").is_file()
    assert not list(work.glob("*.partial"))


def test_half_precision(layout: tuple, work: Path, reference: dict) -> None:
    """bfloat16 weights give nearly the same step, and are exported as such."""
    name, result = layout
    assert result["half"]["loss"] == pytest.approx(reference["untied"]["loss"], abs=0.01)
    assert result["half"]["grad_norm"] == pytest.approx(reference["untied"]["grad_norm"], rel=0.02)
    assert load(work / f"half-{name}").dtype == torch.bfloat16


def test_vocab_parallel_logprob(layout: tuple) -> None:
    """Against log_softmax and autograd over the real columns, with more or fewer padded ones."""
    _, result = layout
    for name, difference in result["logprob"].items():
        assert difference == 0 if "padding" in name else difference < (1e-2 if "bfloat16" in name else 1e-5), name
