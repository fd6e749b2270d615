"""Conversions and checkpoints of a multimodal student: the tower is in all of them, whatever layout reads or writes."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from vision_case import VisionReference, make_images, make_samples
from vision_files_case import CONVERTED, KINDS, LOADS, TRAINED, TRAINED_KIND, make_models

from megatron_opd.config import StudentConfig
from megatron_opd.convert.checks import check_to_hf, check_to_megatron
from megatron_opd.plan.memory import stage_params
from megatron_opd.plan.shape import read_shape
from megatron_opd.student.export import copy_side_files
from megatron_opd.student.hf_weights import weight_mistakes
from megatron_opd.student.sizes import read_hf_config

CASES = [(kind, source, layout) for kind in KINDS for source in CONVERTED for layout in CONVERTED]
LOADED = [
    (by, under, learning) for under, names in LOADS.items() for by in names for learning in ("frozen", "learning")
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of each layout made of each model."""
    folder = tmp_path_factory.mktemp("vision_files")
    make_models(folder / "models")
    model = folder / "models" / TRAINED_KIND
    # The ranks look for images beside the models.
    images = make_images(folder / "models" / "images", model)
    seen = make_samples(VisionReference(model, folder / "models" / "images"), images)
    (folder / "samples").write_bytes(pickle.dumps(seen))
    support = Path(__file__).parents[2] / "support"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("vision_files_worker.py")), str(folder)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.fixture(scope="module")
def saved(work: Path) -> dict[str, Any]:
    return {name: pickle.loads((work / f"{name}.saved").read_bytes()) for name in TRAINED}


@pytest.fixture(scope="module")
def loaded(work: Path) -> dict[str, Any]:
    return {name: pickle.loads((work / f"{name}.loaded").read_bytes()) for name in TRAINED}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and any("visual." in name for name in found)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize(("kind", "source", "layout"), CASES)
def test_the_round_trip_is_equal_to_the_bit(work: Path, kind: str, source: str, layout: str) -> None:
    assert_same(tensors(work / "hf" / f"{kind}-{source}-{layout}"), tensors(work / "models" / kind))


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_a_whole_folder_with_equal_logits_on_an_image(work: Path, kind: str) -> None:
    """With what describes images and the chat, as transformers and a server read it."""
    model, folder = work / "models" / kind, work / "hf" / f"{kind}-tp2-pp2"
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (folder / name).read_text() == (model / name).read_text()
    assert json.loads((folder / "config.json").read_text()) == json.loads((model / "config.json").read_text())
    assert weight_mistakes(folder, read_hf_config(folder)) == []
    images = make_images(work / "pictures", model)
    logits = []
    for each in (model, folder):
        reference = VisionReference(each, work / "pictures")
        (seen,) = [one for one in make_samples(reference, images) if len(one.images) == 3]
        with torch.no_grad():
            logits.append(reference(torch.from_numpy(seen.sample.tokens)[None]).logits)
    assert torch.equal(*logits) and logits[0].isfinite().all()


def test_the_precision_is_named_wherever_config_json_has_it(work: Path, tmp_path: Path) -> None:
    """transformers reads that of the whole, and others that of the text."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(work / "models" / "qwen3", source)
    target.mkdir()
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(config))
    copy_side_files(source, target, torch.bfloat16)
    found = json.loads((target / "config.json").read_text())
    assert found["dtype"] == found["text_config"]["dtype"] == "bfloat16" and "dtype" not in found["vision_config"]


@pytest.mark.parametrize(("by", "under", "learning"), LOADED)
def test_a_checkpoint_is_loaded_by_any_layout(saved: dict, loaded: dict, by: str, under: str, learning: str) -> None:
    """Weights of language model and tower, and the moments of what learns, to the bit; the next step is the same."""
    expected, found = saved[by][learning], loaded[under][by, learning]
    for what in ("weights", "exp_avg", "exp_avg_sq"):
        assert_same(found[what], expected[what])
    assert found["next"] == pytest.approx(expected["next"], abs=1e-5)
    for name, tensor in expected["after"].items():
        torch.testing.assert_close(found["after"][name], tensor, atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize("learning", ["frozen", "learning"])
@pytest.mark.parametrize("layout", TRAINED)
def test_a_plan_knows_how_much_each_rank_has(work: Path, saved: dict, layout: str, learning: str) -> None:
    model = work / "models" / TRAINED_KIND
    student = StudentConfig(model=model, train_vision=learning == "learning", **TRAINED[layout])
    found, shape = saved[layout][learning]["parameters"], read_shape(model, "student.model")
    assert len(found) == student.ranks
    for rank, (learn, frozen) in enumerate(found):
        planned = stage_params(shape, student, rank * student.pipeline_parallel // student.ranks)
        assert (learn, frozen) == (planned.total, planned.frozen)


def test_the_tower_learns_only_where_it_is_told_to(work: Path, saved: dict) -> None:
    start = tensors(work / "models" / TRAINED_KIND)
    tower = [name for name in start if "visual." in name]
    for layout in TRAINED:
        frozen, learning = saved[layout]["frozen"], saved[layout]["learning"]
        for name in tower:
            assert torch.equal(frozen["weights"][name], 1.5 * start[name])
            assert torch.equal(frozen["after"][name], frozen["weights"][name])
        moved = [name for name in tower if not torch.equal(learning["weights"][name], start[name])]
        assert moved == tower


@pytest.mark.parametrize("learning", ["frozen", "learning"])
@pytest.mark.parametrize("layout", CONVERTED)
def test_a_checkpoint_of_training_is_exported_with_its_tower(
    work: Path, saved: dict, layout: str, learning: str
) -> None:
    assert_same(tensors(work / "hf" / f"trained-{learning}-{layout}"), saved["tp2"][learning]["weights"])


def test_the_commands_accept_what_the_ranks_made(work: Path, tmp_path: Path) -> None:
    assert check_to_megatron(work / "models" / "half", tmp_path / "out", []).dtype == "bfloat16"
    run = work / "tp2-learning" / "checkpoints"
    assert check_to_hf(run, tmp_path / "out", []).source == work / "models" / TRAINED_KIND
    size = sum(path.stat().st_size for path in (work / "hf" / "qwen3-one-one").glob("model*"))
    assert np.isclose(size, sum(tensor.nbytes for tensor in tensors(work / "models" / "qwen3").values()), rtol=0.2)
