"""Weight files that are filled in any order are those that safetensors would write."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_opd.errors import ModelError
from megatron_opd.student.hf_weights import INDEX, read_headers
from megatron_opd.student.shards import ShardedFiles

SHAPES = {"a": (3, 5), "b": (7,), "large": (40, 8), "c": (2, 2), "d": (1,)}
TENSORS = {name: torch.randn(shape) for name, shape in SHAPES.items()}


def write(folder: Path, shard_bytes: int, dtype: torch.dtype = torch.float32) -> None:
    folder.mkdir()
    files = ShardedFiles(folder, SHAPES, dtype, shard_bytes)
    for name in random.sample(list(SHAPES), len(SHAPES)):
        files.write(name, TENSORS[name].T.contiguous().T if TENSORS[name].ndim == 2 else TENSORS[name])  # any strides
    files.finish()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_order_gives_the_same_file(tmp_path: Path, dtype: torch.dtype) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, 2**20, dtype)
    (file,) = (tmp_path / "one").iterdir()
    assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    found = load_file(file)
    assert list(read_headers(tmp_path / "one")) == sorted(SHAPES)
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in TENSORS.items())


def test_no_file_is_larger_than_it_may_be_unless_one_tensor_is(tmp_path: Path) -> None:
    write(tmp_path / "model", 100)
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in TENSORS.values())
    held: dict[str, list[str]] = {}
    for name, file in index["weight_map"].items():
        held.setdefault(file, []).append(name)
    assert list(held.values()) == [["a", "b"], ["large"], ["c", "d"]]
    assert list(held) == [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for file, names in held.items():
        assert set(load_file(tmp_path / "model" / file)) == set(names)


def test_what_does_not_belong_there_is_refused(tmp_path: Path) -> None:
    files = ShardedFiles(tmp_path, SHAPES, torch.float32, 100)
    files.write("a", TENSORS["a"])
    for name, tensor in {"a": TENSORS["a"], "b": torch.zeros(8), "e": torch.zeros(1)}.items():
        with pytest.raises(ModelError, match="a tensor too many"):  # twice, of another shape, unknown
            files.write(name, tensor)
    with pytest.raises(ModelError, match="lacks tensors") as caught:
        files.finish()
    assert "b, c, d, large" in str(caught.value)
