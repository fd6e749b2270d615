"""One optimizer step on packed rows, and log-probs of one sequence by the same forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opd.config import LossConfig
from megatron_opd.errors import OpdError
from megatron_opd.recipe.policy_loss import forward_kl_loss, policy_loss
from megatron_opd.records import PackedBatch
from megatron_opd.student.build import Student
from megatron_opd.student.head import Head

# What Megatron's schedule takes back: the loss to differentiate, a token count that it divides by where it is asked
# to (here never, see build._sum_gradients), and what it collects for the caller.
LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


# The batch's arrays that only the loss reads, in the order in which rows are made.
_LOSS_ARRAYS = ("advantages", "behaviour_logprobs", "weights", "forward_weights", "top_ids", "top_logprobs")


class NonFiniteError(OpdError, ArithmeticError):
    """The loss or the gradient is not a finite number; the weights were left as they were."""


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one step did to the whole global batch; the same on every rank. See recipe.policy_loss for the means."""

    loss: float
    grad_norm: float  # before clipping
    learning_rate: float  # the one that this step used
    advantage: float
    abs_advantage: float
    clipped_share: float
    abs_logprob_change: float
    forward_kl: float  # weighted mean of the forward KL where it is asked for, nats


@dataclass(frozen=True, slots=True)
class _Row:
    """One micro-batch on the device: T tokens of S sequences, one after the other."""

    tokens: torch.Tensor  # [T] int64
    labels: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64, counted from 0 in each sequence
    packing: PackedSeqParams
    advantages: torch.Tensor  # [T] float32
    behaviour_logprobs: torch.Tensor  # [T] float32
    weights: torch.Tensor  # [T] float32
    forward_weights: torch.Tensor  # [T] float32
    top_ids: torch.Tensor  # [T, K] int64
    top_logprobs: torch.Tensor  # [T, K] float32


def train_step(student: Student, batch: PackedBatch, loss: LossConfig) -> StepMetrics:
    """One optimizer step on this rank's share of the global batch. Every rank calls it; shares may differ in rows.

    Raises NonFiniteError on every rank, before the optimizer changes a weight, when the loss or the norm of the
    gradient is not finite.
    """
    for chunk in student.model:
        chunk.train()
        chunk.zero_grad_buffer()
    student.optimizer.zero_grad()
    score = partial(_loss_of_row, denominator=batch.denominator, loss=loss)
    sums = _run(student, _batch_rows(student, batch), score, forward_only=False)
    means = _reduce(sums, student.device)
    _require_finite("loss", means["loss"], batch.version)

    # optimizer.step does these two again; doing them here first is the only way to look before it steps.
    student.optimizer.prepare_grads()
    _require_finite("norm of the gradient", float(student.optimizer.get_grad_norm()), batch.version)
    learning_rate = student.optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = student.optimizer.step()
    student.scheduler.step(1)
    return StepMetrics(grad_norm=float(grad_norm), learning_rate=learning_rate, **means)


def sequence_logprobs(student: Student, token_ids: np.ndarray) -> np.ndarray:
    """Log-prob of each next token of one sequence, by the forward pass of training.

    token_ids: [L] int64 with L >= 2; returns [L - 1] float32, entry t for token t + 1. All ranks call it with the same
    tokens, and all get the answer.
    """
    length = len(token_ids)
    labels = np.append(token_ids[1:], 0)
    row = _make_row(student, token_ids, labels, *_no_loss(length), np.array([0, length]))
    for chunk in student.model:
        chunk.eval()
    with torch.no_grad():
        (collected,) = _run(student, [row], _logprobs_of_row, forward_only=True)
    return collected["logprobs"][: length - 1].cpu().numpy()


def _run(
    student: Student, rows: list[_Row], score: Callable[..., LossOutput], forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """Megatron's schedule over ``rows``; what ``score`` collected, one entry for each row."""

    def forward_step(iterator: Iterator[_Row], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        row = next(iterator)
        hidden = model(row.tokens[None], row.positions[None], None, packed_seq_params=row.packing)
        return hidden, partial(score, row, Head(model, student.bridge.vocab_size))

    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iter(rows),
        model=student.model,
        num_microbatches=len(rows),
        seq_length=len(rows[0].tokens),  # not read: rows differ in length
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _row_logprobs(row: _Row, head: Head, hidden: torch.Tensor) -> torch.Tensor:
    """The model's output -> log-probs of each label and of the teacher's top-k ids, [T, 1 + K]."""
    return head.logprobs(hidden, torch.cat([row.labels[:, None], row.top_ids], dim=1))


def _loss_of_row(row: _Row, head: Head, hidden: torch.Tensor, *, denominator: float, loss: LossConfig) -> LossOutput:
    logprobs = _row_logprobs(row, head, hidden)
    policy, metrics = policy_loss(
        logprobs[:, 0],
        row.behaviour_logprobs,
        row.advantages,
        row.weights,
        denominator,
        loss.clip_low,
        loss.clip_high,
    )
    forward, forward_metrics = forward_kl_loss(logprobs[:, 1:], row.top_logprobs, row.forward_weights, denominator)
    total = policy + forward
    return total, _no_count(hidden), {"loss": total.detach(), **metrics, **forward_metrics}


def _logprobs_of_row(row: _Row, head: Head, hidden: torch.Tensor) -> LossOutput:
    logprobs = _row_logprobs(row, head, hidden)[:, 0]
    return logprobs.sum(), _no_count(hidden), {"logprobs": logprobs}


def _no_count(output: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=output.device)


def _batch_rows(student: Student, batch: PackedBatch) -> list[_Row]:
    """The batch's rows; a rank without any gets one that weighs nothing, because all must join the reductions."""
    rows = []
    for start, end in zip(batch.row_offsets[:-1], batch.row_offsets[1:], strict=True):
        inside = (batch.sequence_offsets >= start) & (batch.sequence_offsets <= end)
        arrays = (batch.tokens, batch.labels, *(getattr(batch, name) for name in _LOSS_ARRAYS))
        bounds = batch.sequence_offsets[inside] - start
        rows.append(_make_row(student, *(array[start:end] for array in arrays), bounds))
    if not rows:
        rows.append(_make_row(student, np.zeros(1), np.zeros(1), *_no_loss(1), np.array([0, 1])))
    return rows


def _no_loss(length: int) -> tuple[np.ndarray, ...]:
    """The arrays of ``_LOSS_ARRAYS`` for ``length`` tokens that weigh nothing."""
    nothing, no_rows = np.zeros(length, np.float32), np.zeros((length, 0), np.float32)
    return nothing, nothing, nothing, nothing, no_rows, no_rows


def _make_row(student: Student, tokens: np.ndarray, labels: np.ndarray, *arrays: np.ndarray) -> _Row:
    """Move a row to the device, lengthened by a sequence of weight 0 to what the parallel layout can split.

    arrays: those of ``_LOSS_ARRAYS``, and last the bounds [S + 1], where the sequences start and end, from 0 to the
    length of the row.
    """
    *loss_arrays, bounds = arrays
    config = student.bridge.config
    multiple = config.tensor_model_parallel_size if config.sequence_parallel else 1
    missing = -len(tokens) % multiple
    if missing:
        bounds = np.append(bounds, bounds[-1] + missing)
    lengths = np.diff(bounds)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    device = student.device

    def move(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        longer = np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return torch.from_numpy(longer).to(device=device, dtype=dtype)

    cumulative = torch.from_numpy(bounds).to(device=device, dtype=torch.int32)
    longest = int(lengths.max())
    return _Row(
        tokens=move(tokens, torch.int64),
        labels=move(labels, torch.int64),
        positions=torch.from_numpy(positions).to(device=device),
        packing=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cumulative,
            cu_seqlens_kv=cumulative,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        **{
            name: move(array, torch.int64 if name == "top_ids" else torch.float32)
            for name, array in zip(_LOSS_ARRAYS, loss_arrays, strict=True)
        },
    )


def _reduce(sums: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sum over rows and data-parallel ranks. Tensor-parallel ranks hold equal numbers already."""
    names = list(sums[0])
    total = torch.tensor([[row[name] for name in names] for row in sums], dtype=torch.float64, device=device).sum(0)
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group())
    return dict(zip(names, total.tolist(), strict=True))


def _require_finite(name: str, value: float, version: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"The {name} is not finite; the weights were not changed",
            where=f"training step {version}",
            got=value,
            fix="lower optimizer.lr or loss.max_gap, and look at the step's advantages and log-probs",
        )
