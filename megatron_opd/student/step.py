"""One optimizer step on packed rows, and log-probs of one sequence by the same forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_opd.config import LossConfig
from megatron_opd.errors import OpdError
from megatron_opd.recipe.policy_loss import forward_kl_loss, off_policy_loss, policy_loss
from megatron_opd.records import Image, PackedBatch
from megatron_opd.student.build import Student
from megatron_opd.student.head import Head
from megatron_opd.student.rows import Row, batch_rows, from_last_stage, sequence_rows, whole_row

# What Megatron's schedule takes back: the loss to differentiate, a token count that it divides by where it is asked
# to (here never, see build._sum_gradients), and what it collects for the caller.
LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


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
    abs_logprob_change: float | None  # mean over the tokens that the current weights drew; None when there are none
    forward_kl: float  # weighted mean of the forward KL where it is asked for, nats
    stale_share: float  # share of the tokens that older weights drew; the next two are of these alone
    importance_weight: float | None  # mean; None when there are no such tokens
    truncated_share: float | None


# What is summed over all rows and ranks.
_SUMS = tuple(field.name for field in fields(StepMetrics) if field.name not in ("grad_norm", "learning_rate"))


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
    sums = _run(student, batch_rows(student, batch), score, forward_only=False)
    means = _reduce(sums, student.device)
    _require_finite("loss", means["loss"], batch.version)

    # optimizer.step does these two again; doing them here first is the only way to look before it steps.
    student.optimizer.prepare_grads()
    _require_finite("norm of the gradient", float(student.optimizer.get_grad_norm()), batch.version)
    learning_rate = student.optimizer.param_groups[0]["lr"]
    _, grad_norm, _ = student.optimizer.step()
    student.scheduler.step(1)
    return StepMetrics(grad_norm=float(grad_norm), learning_rate=learning_rate, **_of_their_tokens(means))


def sequence_logprobs(student: Student, token_ids: np.ndarray, images: Sequence[Image] = ()) -> np.ndarray:
    """Log-prob of each next token of one sequence, by the forward pass of training.

    token_ids: [L] int64 with L >= 2; returns [L - 1] float32, entry t for token t + 1. All ranks call it with the same
    tokens and images, and all get the answer.
    """
    rows = sequence_rows(student, token_ids, images)
    for chunk in student.model:
        chunk.eval()
    with torch.no_grad():
        collected = _run(student, rows, _logprobs_of_row, forward_only=True)
    logprobs = whole_row(rows[0], collected[0]["logprobs"] if collected else None)
    return logprobs[:-1].cpu().numpy()


def _run(
    student: Student, rows: list[Row], score: Callable[..., LossOutput], forward_only: bool
) -> list[dict[str, torch.Tensor]]:
    """Megatron's schedule over ``rows``; what ``score`` collected, one entry for each row.

    The last pipeline stage alone scores: on the others the list is empty.
    """

    def forward_step(iterator: Iterator[Row], model: torch.nn.Module) -> tuple[torch.Tensor, Callable]:
        row = next(iterator)
        hidden = model(row.tokens[None], row.positions[None], None, packed_seq_params=row.packing)
        return hidden, partial(score, row, Head(model, student.bridge.vocab_size))

    schedule = get_forward_backward_func()
    return schedule(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in student.model],
        model=student.model,
        num_microbatches=len(rows),
        seq_length=len(rows[0].tokens),  # not read: stages tell each other the lengths of their rows
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _loss_of_row(row: Row, head: Head, hidden: torch.Tensor, *, denominator: float, loss: LossConfig) -> LossOutput:
    def loss_at(logprobs: torch.Tensor, at: slice) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """From log-probs of each label and of the teacher's top-k ids, [P, 1 + K], of the row's positions ``at``."""
        own, behaviour, advantages = logprobs[:, 0], row.behaviour_logprobs[at], row.advantages[at]
        weights, stale = row.weights[at], row.lags[at] > 0
        fresh_weights, stale_weights = weights.masked_fill(stale, 0.0), weights.masked_fill(~stale, 0.0)
        slopes, clips = row.slopes[at], (loss.clip_low, loss.clip_high)
        parts = [
            policy_loss(own, behaviour, advantages, fresh_weights, denominator, *clips),
            off_policy_loss(own, behaviour, advantages, slopes, stale_weights, denominator, loss.importance_cap),
            forward_kl_loss(logprobs[:, 1:], row.top_logprobs[at], row.forward_weights[at], denominator),
        ]
        metrics: dict[str, torch.Tensor] = {}
        for _, found in parts:
            metrics |= {name: metrics.get(name, 0.0) + value for name, value in found.items()}
        return sum(part for part, _ in parts), metrics

    ids = torch.cat([row.labels[:, None], row.top_ids], dim=1)
    total, logprobs = head.loss(hidden, ids, lambda logprobs, at: loss_at(logprobs, at)[0])
    _, metrics = loss_at(logprobs, slice(None))
    return total, _no_count(hidden), {"loss": total.detach(), **metrics}


def _logprobs_of_row(row: Row, head: Head, hidden: torch.Tensor) -> LossOutput:
    logprobs = head.logprobs(hidden, row.labels[:, None])[:, 0]
    return logprobs.sum(), _no_count(hidden), {"logprobs": logprobs}


def _no_count(output: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int, device=output.device)


def _reduce(collected: list[dict[str, torch.Tensor]], device: torch.device) -> dict[str, float]:
    """Sum over rows and over the ranks that share the batch, told to all. Only the last stage collects anything, and
    its tensor-parallel ranks hold equal numbers already."""
    total = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
    for row in collected:
        total += torch.stack([row[name].double() for name in _SUMS])
    dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return dict(zip(_SUMS, from_last_stage(total).tolist(), strict=True))


def _of_their_tokens(means: dict[str, float]) -> dict[str, float | None]:
    """Means over all tokens -> over the stale or the fresh ones alone, where these are the ones that are meant."""
    stale = means["stale_share"]
    shares = {"importance_weight": stale, "truncated_share": stale, "abs_logprob_change": 1.0 - stale}
    # Shares are float32 sums: below a thousandth, one may be nothing but rounding.
    return means | {name: means[name] / share if share > 1e-3 else None for name, share in shares.items()}


def _require_finite(name: str, value: float, version: int) -> None:
    if not math.isfinite(value):
        raise NonFiniteError(
            f"The {name} is not finite; the weights were not changed",
            where=f"training step {version}",
            got=value,
            fix="lower optimizer.lr or loss.max_gap, and look at the step's advantages and log-probs",
        )
