"""Safetensors files that are filled tensor by tensor, in any order, so that none of them is ever whole in memory.

safetensors itself writes a file from tensors that are all there. What is in each file, and where, follows from names
and shapes alone, so the header is written first and each tensor goes to its place when it comes. The files are the
same whatever order that is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_opd.errors import ModelError
from megatron_opd.student.hf_weights import DTYPE_NAMES, INDEX

_ALIGNMENT = 8  # of the header's end, in bytes


@dataclass(frozen=True)
class _Place:
    """Where a tensor goes."""

    file: str
    offset: int  # of its first byte
    shape: tuple[int, ...]


class ShardedFiles:
    """The weight files of one Hugging Face folder. Use it as ``write`` for each tensor, then ``finish``."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        """Make the files. shapes: of all tensors, in their order in the files; shard_bytes: most of one file, where no
        single tensor is larger."""
        self._folder, self._dtype = folder, dtype
        self._places: dict[str, _Place] = {}
        self._waiting = set(shapes)
        shards = _plan(shapes, dtype.itemsize, shard_bytes)
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(file, {name: shapes[name] for name in names})
        if len(shards) > 1:
            self._write_index(dtype.itemsize * sum(map(math.prod, shapes.values())))

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor, of any device and of the files' precision, to its place. Raises ModelError for a wrong one."""
        place = self._places.get(name)
        if place is None or name not in self._waiting or place.shape != tuple(tensor.shape):
            expected = "no such tensor" if place is None else f"{list(place.shape)}, once"
            raise ModelError("The model has a tensor too many", where=name, got=list(tensor.shape), expected=expected)
        content = tensor.detach().to("cpu", self._dtype).contiguous().flatten().view(torch.uint8)
        with (self._folder / place.file).open("r+b") as file:
            file.seek(place.offset)
            file.write(content.numpy().data)
        self._waiting.remove(name)

    def finish(self) -> None:
        """Make all of it survive a power cut. Raises ModelError when a tensor never came."""
        if self._waiting:
            raise ModelError("The model lacks tensors", where=self._folder, got=", ".join(sorted(self._waiting)[:5]))
        for file in {place.file for place in self._places.values()}:
            with (self._folder / file).open("r+b") as handle:
                os.fsync(handle.fileno())

    def _begin(self, file: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Write the header of a file and give it its size."""
        kind = next(name for name, ours in DTYPE_NAMES.items() if getattr(torch, ours) == self._dtype)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        ends, end = {}, 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape) * self._dtype.itemsize
            header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, end]}
            ends[name] = start
        beginning = _encoded(header)
        first = len(beginning)
        with (self._folder / file).open("wb") as handle:
            handle.write(beginning)
            handle.truncate(first + end)
        self._places |= {name: _Place(file, first + start, tuple(shapes[name])) for name, start in ends.items()}

    def _write_index(self, total: int) -> None:
        weight_map = {name: place.file for name, place in self._places.items()}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """One file of tensors of any device and precision, each out of the memory it is in: safetensors' own way makes two
    copies first, which take longer than the writing. Raises OSError."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    tensors, end = list(tensors), 0
    for name, tensor in tensors:
        start, end = end, end + tensor.nbytes
        kind = next(name for name, ours in DTYPE_NAMES.items() if getattr(torch, ours) == tensor.dtype)
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    with path.open("wb") as file:
        file.write(_encoded(header))
        for _, tensor in tensors:
            file.write(tensor.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)


def _encoded(header: dict[str, object]) -> bytes:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _plan(shapes: Mapping[str, tuple[int, ...]], itemsize: int, shard_bytes: int) -> list[list[str]]:
    """Names in each file, in their order: a file is full when the next tensor would make it larger than it may be."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        own = math.prod(shape) * itemsize
        if shards[-1] and size + own > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    return shards
