"""The weights alone in Megatron's checkpoint format ("torch_dist"), read and written one tensor at a time.

A model's matrices of gate and up projection are one parameter and two tensors of the checkpoint. Megatron's own reading
and writing copy both halves of every layer, half of a model and more; here each half is a view of its parameter, and
tensors are read into it, or written from it, in place.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import torch as torch_dist
from torch.distributed.checkpoint.api import CheckpointException

from megatron_opd.errors import CheckpointError
from megatron_opd.student.build import DTYPES, Model
from megatron_opd.student.checkpoint import METADATA

_VERSION = 3.0  # of Megatron's checkpoints: where a fused query, key and value matrix has what
_EMBEDDINGS = ("embedding.word_embeddings.weight", "output_layer.weight")  # padded for the layout that wrote them
_LISTED = 5


def save_model(model: Model, folder: Path) -> None:
    """Write the weights to the empty ``folder``. All ranks call it. Raises CheckpointError when one cannot write."""
    state = _sharded(model) | {"iteration": 0, "checkpoint_version": _VERSION}
    try:
        dist_checkpointing.save(state, str(folder), sharded_strategy=_InPlace("torch_dist", 1))
    except CheckpointException as error:
        raise CheckpointError("The checkpoint cannot be written", where=folder, got=error) from error


@torch.no_grad()
def load_model(model: Model, folder: Path, saved_tensor_parallel: int) -> None:
    """Read the weights, and nothing else, of a checkpoint saved under any layout. All ranks call it.

    saved_tensor_parallel: ranks that shared a matrix of the checkpoint, by which its vocabulary is padded. Raises
    CheckpointError, before anything is read, when the checkpoint is another model's.
    """
    state = _sharded(model)
    apply_factories(state)
    targets = [tensor for tensor in nested_values(state) if isinstance(tensor, ShardedTensor)]
    _check_tensors(model, targets, folder, saved_tensor_parallel)
    data = [tensor.data for tensor in targets]
    wanted = {str(number): tensor for number, tensor in enumerate(targets)}
    loaded = dist_checkpointing.load(wanted, str(folder))
    for number, target in enumerate(data):
        found = loaded[str(number)]
        if found.data_ptr() != target.data_ptr():  # read into another tensor than the one it was given
            target.copy_(found.view_as(target))


def saved_dtype(folder: Path) -> str:
    """Precision of the weights in a checkpoint, "float32" or "bfloat16". Raises CheckpointError for another."""
    tensor = _saved_tensors(folder).get(_EMBEDDINGS[0])
    names = [name for name, dtype in DTYPES.items() if tensor is not None and tensor.dtype == dtype]
    if not names:
        got = "no word embeddings" if tensor is None else tensor.dtype
        raise CheckpointError("The checkpoint is no language model of ours", where=folder, got=got)
    return names[0]


def _saved_tensors(folder: Path) -> dict[str, ShardedTensor]:
    """Every tensor of a checkpoint, without data."""
    try:
        return dist_checkpointing.load_tensors_metadata(str(folder))
    except (CheckpointingException, OSError, UnpicklingError) as error:
        raise CheckpointError("The folder cannot be read as a Megatron checkpoint", where=folder, got=error) from error


class _InPlace(torch_dist.TorchDistSaveShardedStrategy):
    """Megatron's format, written by torch's writer: one file for each rank, one tensor after the other."""

    def save(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path | str) -> None:
        """All ranks call it. Raises CheckpointException on all of them when one fails."""
        named, _, _ = torch_dist._replace_state_dict_keys_with_sharded_keys(sharded_state_dict, True)
        torch_checkpoint.save(
            torch_dist.mcore_to_pyt_state_dict(named, False),
            storage_writer=torch_checkpoint.FileSystemWriter(checkpoint_dir, overwrite=False),
            planner=torch_dist.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )


def _sharded(model: Model) -> dict[str, Any]:
    """The model's tensors, each with its place in the global one, under Megatron's names for the chunks."""
    names = ["model"] if len(model.chunks) == 1 else [f"model{number}" for number in range(len(model.chunks))]
    return {
        name: chunk.sharded_state_dict(metadata=dict(METADATA)) for name, chunk in zip(names, model.chunks, strict=True)
    }


def _check_tensors(model: Model, targets: list[ShardedTensor], folder: Path, saved_tensor_parallel: int) -> None:
    saved = _saved_tensors(folder)
    mistakes = list(_differences(model, targets, saved, saved_tensor_parallel))
    if mistakes:
        more = f" and {len(mistakes) - _LISTED} more" if len(mistakes) > _LISTED else ""
        raise CheckpointError(
            "The checkpoint is not one of the model that config.json describes",
            where=folder,
            got="; ".join(mistakes[:_LISTED]) + more,
            fix="name the Hugging Face folder that the run started from: source=...",
        )


def _differences(
    model: Model, targets: list[ShardedTensor], saved: dict[str, ShardedTensor], saved_tensor_parallel: int
) -> Iterator[str]:
    """A clause for each tensor that the checkpoint has not, or has in another shape or precision."""
    vocab = model.bridge.vocab_size
    for key, target in {tensor.key: tensor for tensor in targets}.items():
        if key not in saved:
            yield f"it has no {key}"
            continue
        shape = tuple(target.global_shape)
        if key in _EMBEDDINGS:
            shape = (vocab + -vocab % saved_tensor_parallel, *shape[1:])
        found = saved[key]
        if tuple(found.global_shape) != shape:
            yield f"{key} is {list(found.global_shape)} instead of {list(shape)}"
        elif found.dtype != target.dtype:
            yield f"{key} is {found.dtype} instead of {target.dtype}"
