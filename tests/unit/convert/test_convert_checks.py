"""What is wrong with a conversion is told, all at once, before anything is started and without touching OUT."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_opd.convert.checks import check_to_hf, check_to_megatron, find_checkpoint, find_source
from megatron_opd.errors import CheckpointError, ConfigError, ModelError, OpdError
from megatron_opd.runtime.checkpoints import MANIFEST, RELEASE, TRACKER, point_tracker, write_manifest
from megatron_opd.runtime.conversion import SIDE_FILES
from megatron_opd.student.hf_weights import INDEX, expected_shapes, weights_dtype

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
NORM = "model.norm.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder whose weights are in two files."""
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, CONFIG)
    return folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def write(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(folder, config).items()}
    names = list(tensors)
    weight_map = {}
    for number, part in enumerate((names[:5], names[5:]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def change(folder: Path, **fields: Any) -> None:
    (folder / "config.json").write_text(json.dumps(CONFIG | fields))


def edit(folder: Path, name: str, tensor: np.ndarray | None) -> None:
    """Replace a tensor of the second file, or take it out of the file and the index."""
    path, index = folder / "model-00002-of-00002.safetensors", folder / INDEX
    tensors, weight_map = load_file(path), json.loads(index.read_text())["weight_map"]
    del tensors[name], weight_map[name]
    if tensor is not None:
        tensors[name], weight_map[name] = tensor, path.name
    save_file(tensors, path)
    index.write_text(json.dumps({"weight_map": weight_map}))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def refused(model: Path, out: Path, *options: str) -> str:
    with pytest.raises(OpdError) as caught:
        check_to_megatron(model, out, list(options))
    assert not out.exists()
    return str(caught.value)


def test_a_good_model_passes(model: Path, out: Path) -> None:
    plan = check_to_megatron(model, out, ["tensor_parallel=2", "pipeline_parallel=2"])
    assert (plan.config.tensor_parallel, plan.dtype) == (2, "float32")
    assert check_to_megatron(model, out, ["dtype=bfloat16"]).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: (m / "model-00001-of-00002.safetensors").unlink(), "index names weight files that are not there"),
        (lambda m: cut(m / "model-00002-of-00002.safetensors", -8), "A weight file is damaged"),
        (lambda m: cut(m / "model-00002-of-00002.safetensors", 20), "A weight file is damaged"),
        (lambda m: (m / INDEX).write_text("{"), "index of the weights cannot be read"),
        (lambda m: (m / INDEX).write_text('{"weight_map": {"a": 1}}'), "index of the weights cannot be read"),
        (lambda m: (m / INDEX).unlink(), None),  # the files alone say the same
        (lambda m: edit(m, NORM, None), f"lacks weights.*{NORM}"),
        (lambda m: edit(m, NORM, np.zeros(9, np.float32)), rf"{NORM} is \[9\] instead of \[8\]"),
        (lambda m: edit(m, NORM, np.zeros(8, np.float16)), "precision of the weights cannot be kept.*F16 and F32"),
        (lambda m: change(m, tie_word_embeddings=True), None),  # a spare copy, which nobody reads
        (lambda m: change(m, num_hidden_layers=1), r"has not.*model\.layers\.1\.\S+, .*and 6 more"),
        (lambda m: change(m, num_hidden_layers=3), r"lacks weights.*model\.layers\.2\."),
        (lambda m: change(m, model_type="gpt_bigcode"), "model type is not supported.*gpt_bigcode"),
        (lambda m: change(m, model_type="qwen2"), r"self_attn\.q_proj\.bias.*self_attn\.q_norm\.weight"),
        (lambda m: change(m, hidden_size=None), "lacks a size.*hidden_size"),
        (lambda m: (m / "config.json").unlink(), r"no config\.json"),
    ],
)
def test_a_damaged_model_is_refused(model: Path, out: Path, damage: Any, message: str | None) -> None:
    damage(model)
    if message is None:
        check_to_megatron(model, out, [])
    else:
        assert re.search(message, refused(model, out), re.DOTALL), refused(model, out)


def test_two_files_with_one_tensor_are_refused(model: Path, out: Path) -> None:
    (model / INDEX).unlink()
    save_file({NORM: np.zeros(8, np.float32)}, model / "other.safetensors")
    assert "Two weight files hold the same tensor" in refused(model, out)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 32}, "a window of 32 tokens in a context of 64"),
        ({}, "a window of 4096 tokens in a context of 5000"),  # what transformers takes when nothing is said
        ({"sliding_window": 64}, None),
        ({"sliding_window": None}, None),
    ],
)
def test_a_window_that_matters_is_refused(tmp_path: Path, out: Path, fields: dict[str, Any], message: str) -> None:
    context = 64 if fields else 5000
    write(tmp_path, CONFIG | {"model_type": "mistral", "max_position_embeddings": context} | fields)
    if message is None:
        check_to_megatron(tmp_path, out, [])
    else:
        text = refused(tmp_path, out)
        assert message in text and "set max_position_embeddings to" in text


def test_everything_is_told_at_once(tmp_path: Path, model: Path, out: Path) -> None:
    cut(model / "model-00002-of-00002.safetensors", -8)
    with pytest.raises(ConfigError) as caught:
        check_to_megatron(model, tmp_path, ["tensor_parallel=4", "pipeline_parallel=3"])
    text = str(caught.value)
    for part in (
        "5 things must be put right",
        "The folder to write exists already",
        "6 attention heads over 4 tensor-parallel ranks",
        "2 key-value heads over 4",
        "2 layers over 3 pipeline stages",
        "A weight file is damaged",
    ):
        assert part in text, text
    assert "student." not in text and "where:    tensor_parallel" in text


def test_options_are_checked(tmp_path: Path, out: Path) -> None:
    text = refused(tmp_path / "nowhere", out, "tensor_paralel=2", "dtype=fp8", "pipeline_parallel=0")
    assert "2 things" in text and "3 mistakes" in text and "folder does not exist" in text
    assert "tensor_paralel: unknown key; did you mean tensor_parallel?" in text
    assert "the keys are tensor_parallel, pipeline_parallel" in text
    assert "Malformed option" in refused(tmp_path / "nowhere", out, "tensor_parallel")


def test_a_place_that_cannot_be_written_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "not a folder to write in" in refused(model, tmp_path / "file" / "out")


def test_mixed_precision_needs_a_word(model: Path) -> None:
    assert weights_dtype(model) == "float32"
    edit(model, NORM, np.zeros(8, np.float16))
    with pytest.raises(ModelError, match=r"dtype=float32"):
        weights_dtype(model)


@pytest.fixture
def checkpoint(model: Path, tmp_path: Path) -> Path:
    """What to-megatron leaves, with something else for weights."""
    folder = tmp_path / "megatron" / RELEASE
    (folder / SIDE_FILES).mkdir(parents=True)
    (folder / SIDE_FILES / "config.json").write_text((model / "config.json").read_text())
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    write_manifest(folder, "converted", 0, {"tensor": 2})
    point_tracker(folder.parent, RELEASE)
    return folder


def test_a_checkpoint_is_found_by_its_tracker(checkpoint: Path, out: Path) -> None:
    plan = check_to_hf(checkpoint.parent, out, ["tensor_parallel=2", "shard_gb=0.5"])
    assert (plan.checkpoint, plan.source) == (checkpoint, checkpoint / SIDE_FILES)
    assert plan.manifest.layout["tensor"] == 2 and plan.config.shard_gb == 0.5
    other = checkpoint.rename(checkpoint.with_name("iter_0000010"))
    point_tracker(checkpoint.parent, "10")
    assert find_checkpoint(checkpoint.parent) == find_checkpoint(other) == other


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: (c / "__0_0.distcp").write_bytes(bytes(99)), r"A file is damaged.*99 bytes"),
        (lambda c: (c / "__0_0.distcp").write_bytes(bytes(99) + b"x"), r"A file is damaged.*sha256"),
        (lambda c: (c / "__0_0.distcp").unlink(), "A file is damaged.*no such file"),
        (lambda c: (c / MANIFEST).unlink(), "checkpoint that the tracker names is not there"),
        (lambda c: (c / MANIFEST).write_text("{"), "manifest cannot be read"),
        (lambda c: (c.parent / TRACKER).write_text("soon"), "tracker names no checkpoint.*soon"),
        (lambda c: (c.parent / TRACKER).unlink(), "no complete Megatron checkpoint.*manifest.json"),
        (lambda c: c.rename(c.with_name("elsewhere")), "tracker names is not there"),
    ],
)
def test_a_damaged_checkpoint_is_refused(checkpoint: Path, out: Path, damage: Any, message: str) -> None:
    damage(checkpoint)
    with pytest.raises(CheckpointError) as caught:
        check_to_hf(checkpoint.parent, out, [])
    assert re.search(message, str(caught.value), re.DOTALL), caught.value


def test_the_model_of_a_checkpoint_must_be_known(tmp_path: Path, checkpoint: Path, model: Path, out: Path) -> None:
    run = tmp_path / "runs" / "mine"
    folder = run / "checkpoints" / "iter_0000010"
    folder.mkdir(parents=True)
    write_manifest(folder, "0123", 10, {"tensor": 1})
    with pytest.raises(ModelError, match="not known which model"):
        check_to_hf(folder, out, [])
    assert check_to_hf(folder, out, [f"source={model}"]).source == model
    (run / "config.yaml").write_text(
        f"name: mine\nsteps: 1\nstudent: {{model: {model}}}\nteachers: {{math: {{model: x}}}}\ndata: {{train: x}}\n"
    )
    assert find_source(folder, None) == model
    model.rename(model.with_name("gone"))
    with pytest.raises(ModelError, match="that the run started from is not there"):
        check_to_hf(folder, out, [])


def test_layouts_of_an_export_are_checked(checkpoint: Path, out: Path) -> None:
    with pytest.raises(ConfigError, match="6 attention heads over 5 tensor-parallel ranks"):
        check_to_hf(checkpoint, out, ["tensor_parallel=5", "pipeline_parallel=2"])


def test_checking_needs_no_torch() -> None:
    code = "import sys, megatron_opd.convert.command; assert not {'torch', 'megatron', 'mbridge'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
