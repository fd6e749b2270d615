"""The student as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from mbridge.core import Bridge
from megatron.core.utils import unwrap_model

from megatron_opd.errors import ModelError
from megatron_opd.student.build import DTYPES, Student
from megatron_opd.student.hf_weights import expected_shapes
from megatron_opd.student.shards import ShardedFiles
from megatron_opd.student.sizes import read_hf_config
from megatron_opd.student.vision.parts import without_frozen_tower

SHARD_BYTES = 4 * 1024**3
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model"}


@torch.no_grad()
def hf_weights(student: Student, *, learning: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face name and whole tensor, on the student's device and of its dtype, one after the other.

    All ranks go through it to the end, and all get every tensor, with the padding of the vocabulary cut off. A tensor
    may share memory with the live weights: copy what has to outlive the next step. ``learning`` leaves a vision tower
    out that is frozen.
    """
    for chunk in student.model:
        if chunk.ddp_config.overlap_param_gather:  # the step left the gathering to the next forward pass
            chunk.start_param_sync(force_sync=True)
    chunks = unwrap_model(student.model)
    yield from gathered_weights(student.bridge, list(map(without_frozen_tower, chunks)) if learning else chunks)


@torch.no_grad()
def gathered_weights(bridge: Bridge, chunks: list[torch.nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """The same for chunks of a model, whether wrapped for training or not."""
    seen = set()
    for name, tensor in bridge.export_weights(chunks):
        if name not in seen:  # a tied embedding is on the first and on the last pipeline stage
            seen.add(name)
            yield name, tensor


def export_hf(student: Student, source_folder: Path, out_folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the weights, with the config and tokenizer files of ``source_folder``, to ``out_folder``.

    All ranks call it; rank 0 writes, and ``out_folder`` appears in one rename when it is complete. Weights keep the
    student's dtype and the vocabulary's own size. Raises ModelError when ``out_folder`` exists.
    """
    partial = out_folder.with_name(out_folder.name + ".partial")
    if dist.get_rank() == 0:
        if out_folder.exists():
            raise ModelError("The export folder exists", where=out_folder.absolute(), fix="name a new folder")
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that did not finish
        partial.mkdir(parents=True)
    write_hf(hf_weights(student), student.bridge.dtype, source_folder, partial, shard_bytes)
    if dist.get_rank() == 0:
        partial.rename(out_folder)
    dist.barrier()


def write_hf(
    weights: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype, source: Path, target: Path, shard_bytes: int
) -> None:
    """Fill the folder ``target`` with ``weights`` of ``dtype`` and the other files of ``source``.

    All ranks call it, and rank 0 writes, one tensor at a time.
    """
    if dist.get_rank() != 0:
        for _ in weights:  # each tensor is gathered from all ranks
            pass
        return
    copy_side_files(source, target, dtype)
    files = ShardedFiles(target, expected_shapes(source, read_hf_config(source)), dtype, shard_bytes)
    for name, tensor in weights:
        files.write(name, tensor)
    files.finish()


def copy_side_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config, tokenizer and image processor files; config.json names the dtype of the weights beside it."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 and 4
    name = next(name for name, value in DTYPES.items() if value == dtype)
    config[key] = name
    for part in ("text_config", "vision_config"):  # of a multimodal model, which may repeat it
        if key in config.get(part, {}):
            config[part][key] = name
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
