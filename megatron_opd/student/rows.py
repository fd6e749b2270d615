"""From a packed batch to this rank's micro-batches on its device, and back from a rank's values to a row's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.records import Image, PackedBatch
from megatron_opd.student.build import Student
from megatron_opd.student.context import lengthen, positions_of_rank
from megatron_opd.student.vision.packing import seeing_packing
from megatron_opd.student.vision.placing import RowImages, check_images, row_images, sequence_images

# The batch's arrays that only the loss reads, in the order in which rows are made.
_LOSS_ARRAYS = (
    *("advantages", "behaviour_logprobs", "weights", "lags", "slopes"),
    *("forward_weights", "top_ids", "top_logprobs"),
)

_WHOLE = ("lags", "top_ids")  # whole numbers

_FP8_TOKENS = 16  # Transformer Engine's 8-bit products need a multiple of this many tokens on each rank


@dataclass(frozen=True, slots=True)
class Row:
    """One micro-batch on the device: this context-parallel rank's T tokens of S sequences, one after the other.

    Every pipeline stage has all of it: the first reads the tokens, the last what belongs to the loss.
    """

    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, counted from 0 in each sequence
    packing: PackedSeqParams  # bounds of the sequences over all context-parallel ranks
    advantages: torch.Tensor  # [T] float32
    behaviour_logprobs: torch.Tensor  # [T] float32
    weights: torch.Tensor  # [T] float32
    lags: torch.Tensor  # [T] int64
    slopes: torch.Tensor  # [T] float32
    forward_weights: torch.Tensor  # [T] float32
    top_ids: torch.Tensor  # [T, K] int64
    top_logprobs: torch.Tensor  # [T, K] float32
    origins: torch.Tensor  # [T] int64, position in the row as the batch has it; -1 where it was lengthened
    length: int  # of the row as the batch has it


def batch_rows(student: Student, batch: PackedBatch) -> list[Row]:
    """The batch's rows, and as many that weigh nothing as the schedule needs."""
    rows = []
    for start, end in zip(batch.row_offsets[:-1], batch.row_offsets[1:], strict=True):
        inside = (batch.sequence_offsets >= start) & (batch.sequence_offsets <= end)
        arrays = (batch.tokens, batch.labels, *(getattr(batch, name) for name in _LOSS_ARRAYS))
        bounds = batch.sequence_offsets[inside] - start
        images = row_images(batch, start, end)
        rows.append(_make_row(student, images, *(array[start:end] for array in arrays), bounds))
    return _fill(student, rows)


def sequence_rows(student: Student, token_ids: np.ndarray, images: Sequence[Image] = ()) -> list[Row]:
    """A row of one sequence without any loss, and what the schedule needs after it."""
    return _fill(student, [_plain_row(student, token_ids, images)])


def whole_row(row: Row, values: torch.Tensor | None) -> torch.Tensor:
    """Values [T] of the row's positions, each where the batch has it, on every rank of the model: [row length] float32.

    values: what this rank of the last pipeline stage found; None on the other stages. All ranks call it.
    """
    whole = torch.zeros(row.length, device=row.tokens.device)
    if values is not None:
        known = row.origins >= 0
        whole[row.origins[known]] = values[known].float()
    dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
    return from_last_stage(whole)


def from_last_stage(values: torch.Tensor) -> torch.Tensor:
    """What the last pipeline stage has in ``values``, on all stages; changed in place."""
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(values, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return values


def _fill(student: Student, rows: list[Row]) -> list[Row]:
    """Add rows that weigh nothing. A rank without any row gets one, because all must join the reductions.

    Two layouts need more. Interleaved stages take micro-batches in groups of as many as there are stages. And a rank's
    experts serve the rows of the other expert-parallel ranks, so that all of these must run equally many.
    """
    config = student.bridge.config
    wanted = max(len(rows), 1)
    if config.expert_model_parallel_size > 1:
        most = torch.tensor(wanted, device=student.device)
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
        wanted = int(most)
    if config.virtual_pipeline_model_parallel_size is not None:
        wanted += -wanted % config.pipeline_model_parallel_size
    return rows + [_plain_row(student, np.zeros(1, np.int64)) for _ in range(wanted - len(rows))]


def _plain_row(student: Student, tokens: np.ndarray, images: Sequence[Image] = ()) -> Row:
    """One sequence of L >= 1 tokens that weighs nothing."""
    length = len(tokens)
    nothing, no_rows = np.zeros(length, np.float32), np.zeros((length, 0), np.float32)
    no_loss = (nothing, nothing, nothing, nothing, nothing, nothing, no_rows, no_rows)
    labels = np.append(tokens[1:], 0)
    return _make_row(student, sequence_images(images), tokens, labels, *no_loss, np.array([0, length]))


def _make_row(student: Student, images: RowImages, tokens: np.ndarray, labels: np.ndarray, *arrays: np.ndarray) -> Row:
    """Move this rank's part of a row to the device, the row lengthened to what the parallel layout can split.

    arrays: those of ``_LOSS_ARRAYS``, and last the bounds [S + 1], where the sequences start and end, from 0 to the
    length of the row.
    """
    *loss_arrays, bounds = arrays
    check_images(images, tokens, student.images.vision.image_token if student.images else None)
    config, device = student.bridge.config, student.device
    held = bounds
    bounds, origins, places = lengthen(held, *_multiples(student))
    if config.context_parallel_size > 1:
        mine = positions_of_rank(bounds, config.context_parallel_size, parallel_state.get_context_parallel_rank())
        origins, places = origins[mine], places[mine]

    def move(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        taken = array[origins]  # an index of -1 takes the last position, which is then replaced
        taken[origins < 0] = 0
        return torch.from_numpy(taken).to(device=device, dtype=dtype)

    packing = _packing(bounds, device, cut=config.context_parallel_size > 1)
    if student.images is not None:
        packing = seeing_packing(packing, student.images, config, images, held, origins)
    return Row(
        tokens=move(tokens, torch.int64),
        labels=move(labels, torch.int64),
        positions=torch.from_numpy(places).to(device=device),
        packing=packing,
        origins=torch.from_numpy(origins).to(device=device),
        length=len(tokens),
        **{
            name: move(array, torch.int64 if name in _WHOLE else torch.float32)
            for name, array in zip(_LOSS_ARRAYS, loss_arrays, strict=True)
        },
    )


def _multiples(student: Student) -> tuple[int, int]:
    """What the length of each sequence, and of the row, must be a multiple of."""
    config = student.bridge.config
    ranks = config.context_parallel_size
    sequence = 2 * ranks if ranks > 1 else 1
    share = config.tensor_model_parallel_size if config.sequence_parallel else 1
    if config.fp8:
        share *= _FP8_TOKENS
    return sequence, math.lcm(sequence, ranks * share)


def _packing(bounds: np.ndarray, device: torch.device, cut: bool) -> PackedSeqParams:
    """Bounds of the sequences for attention and rotary embedding; cut: whether context-parallel ranks share them.

    What was added counts as part of its sequence: it comes last, so that no real token attends to it.
    """
    cumulative = torch.from_numpy(bounds).to(device=device, dtype=torch.int32)
    longest = int(np.diff(bounds).max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative,
        cu_seqlens_kv=cumulative,
        cu_seqlens_q_padded=cumulative if cut else None,  # Transformer Engine wants it told where it cuts
        cu_seqlens_kv_padded=cumulative if cut else None,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
