"""Weights from Hugging Face to Megatron and back, for every family, from any layout to any other: equal to the bit."""

from __future__ import annotations

import filecmp
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from convert_case import CASES, DENSE, make_models, sources_of
from safetensors.torch import load_file
from student_case import EXPERTS, VOCAB
from transformers import AutoModelForCausalLM

from megatron_opd.convert.checks import check_to_hf


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of each layout made of each model."""
    folder = tmp_path_factory.mktemp("convert")
    make_models(folder / "models")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("convert_worker.py")), str(folder)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(("kind", "source", "layout"), CASES)
def test_the_round_trip_is_equal_to_the_bit(work: Path, kind: str, source: str, layout: str) -> None:
    expected, found = tensors(work / "models" / kind), tensors(work / "hf" / f"{kind}-{source}-{layout}")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("kind", "source", "layout"), CASES)
def test_an_export_has_all_files_and_is_the_same_under_every_layout(
    work: Path, kind: str, source: str, layout: str
) -> None:
    """An index and small files where they were asked for; else one file, equal byte by byte."""
    folder, model = work / "hf" / f"{kind}-{source}-{layout}", work / "models" / kind
    for name in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_text() == (model / name).read_text()
    assert json.loads((folder / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    first = "experts_one" if kind in EXPERTS else "one"
    other = work / "hf" / f"{kind}-{first if source == layout else sources_of(first)[1]}-{first}"
    names = sorted(path.name for path in folder.glob("model*"))
    assert names == sorted(path.name for path in other.glob("model*"))
    assert (len(names) > 3 and "model.safetensors.index.json" in names) == (source == layout)
    for name in names:
        assert filecmp.cmp(folder / name, other / name, shallow=False), name


@pytest.mark.parametrize("kind", [*DENSE, *EXPERTS])
def test_an_export_gives_the_same_logits_in_transformers(work: Path, kind: str) -> None:
    layout = "experts_ep2" if kind in EXPERTS else "tp2_pp2"
    logits = []
    for folder in (work / "models" / kind, work / "hf" / f"{kind}-{layout}-{layout}"):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        assert model.dtype == (torch.bfloat16 if kind == "half" else torch.float32)
        with torch.no_grad():
            logits.append(model(torch.arange(0, VOCAB, 9)[None]).logits)
    assert torch.equal(*logits) and logits[0].isfinite().all()


def test_a_checkpoint_of_a_training_run_holds_what_was_trained(work: Path, tmp_path: Path) -> None:
    """Saved with optimizer state, over two interleaved stages; exported by one process, which the command starts."""
    plan = check_to_hf(work / "run" / "checkpoints", tmp_path / "hf", [])
    assert plan.source == work / "models" / "untied" and plan.checkpoint.name == "iter_0000001"
    command = [sys.executable, "-W", "ignore", "-m", "megatron_opd.cli", "convert", "to-hf"]
    subprocess.run([*command, str(work / "run" / "checkpoints"), str(tmp_path / "hf")], check=True, timeout=200)
    expected, found = load_file(work / "trained.safetensors"), tensors(tmp_path / "hf")
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    start = tensors(work / "models" / "untied")
    assert not any(torch.equal(found[name], start[name]) for name in start)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("qwen2", "it has no decoder.layers.self_attention.linear_qkv.bias"),
        ("short", "[4, 16] instead of [2, 16]"),
        ("wide", f"[{VOCAB + 1}, 32] instead of [{VOCAB + 9}, 32]"),  # padded for the two ranks that saved it
    ],
)
def test_another_models_checkpoint_is_refused(work: Path, kind: str, message: str) -> None:
    text = (work / f"{kind}.txt").read_text()
    assert "not one of the model that config.json describes" in text and "source=" in text and message in text
