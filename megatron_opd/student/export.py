"""The student as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from megatron_opd.errors import ModelError
from megatron_opd.student.build import DTYPES, Student

_SHARD_BYTES = 4 * 1024**3
_COPIED_SUFFIXES = {".json", ".jinja", ".txt", ".model"}
_INDEX_NAME = "model.safetensors.index.json"


@torch.no_grad()
def hf_weights(student: Student) -> Iterator[tuple[str, torch.Tensor]]:
    """Hugging Face name and whole tensor, on the student's device and of its dtype, one after the other.

    All ranks go through it to the end, and all get every tensor, with the padding of the vocabulary cut off. A tensor
    may share memory with the live weights: copy what has to outlive the next step.
    """
    for chunk in student.model:
        if chunk.ddp_config.overlap_param_gather:  # the step left the gathering to the next forward pass
            chunk.start_param_sync(force_sync=True)
    seen = set()
    for name, tensor in student.bridge.export_weights(student.model):
        if name not in seen:  # a tied embedding is on the first and on the last pipeline stage
            seen.add(name)
            yield name, tensor


def export_hf(student: Student, source_folder: Path, out_folder: Path) -> None:
    """Write the weights, with the config and tokenizer files of ``source_folder``, to ``out_folder``.

    All ranks call it; rank 0 writes, and ``out_folder`` appears in one rename when it is complete. Weights keep the
    student's dtype and the vocabulary's own size. Raises ModelError when ``out_folder`` exists.
    """
    weights = hf_weights(student)
    if dist.get_rank() == 0:
        if out_folder.exists():
            raise ModelError("The export folder exists", where=out_folder.absolute(), fix="name a new folder")
        partial = out_folder.with_name(out_folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)  # left by an export that did not finish
        partial.mkdir(parents=True)
        _copy_side_files(source_folder, partial, student.bridge.dtype)
        _write_shards(weights, partial)
        partial.rename(out_folder)
    else:
        for _ in weights:  # each tensor is gathered from all ranks
            pass
    dist.barrier()


def _copy_side_files(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy config and tokenizer files; config.json names the dtype of the weights beside it."""
    for path in source.iterdir():
        if path.is_file() and path.suffix in _COPIED_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    key = "dtype" if "dtype" in config else "torch_dtype"  # transformers 5 and 4
    config[key] = next(name for name, value in DTYPES.items() if value == dtype)
    config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write tensors as they come, so that one shard at a time is in memory."""
    shards: list[dict[str, int]] = []  # bytes of each tensor, by name
    pending: dict[str, torch.Tensor] = {}

    def flush() -> None:
        save_file(pending, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append({name: tensor.nbytes for name, tensor in pending.items()})
        pending.clear()

    for name, tensor in weights:
        # A copy: safetensors refuses tensors that share memory.
        pending[name] = tensor.to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in pending.values()) >= _SHARD_BYTES:
            flush()
    if pending:
        flush()
    _name_shards(shards, folder)


def _name_shards(shards: list[dict[str, int]], folder: Path) -> None:
    """Give shards the names that transformers expects, which hold their number, and write the index."""
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards):
        name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{number}").rename(folder / name)
        weight_map.update(dict.fromkeys(shard, name))
    total = sum(sum(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
