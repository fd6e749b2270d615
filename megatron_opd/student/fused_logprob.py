"""Log-probabilities of chosen tokens straight from hidden states: the logits exist one block at a time.

T positions of this rank's rows, H hidden size, V columns of the output weight over all tensor-parallel ranks (padding
included), C ids of each position. A block is some positions by some columns, small enough to stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

# Positions and columns of a block: in cache on a CPU, measured; large enough to fill a GPU, an estimate.
BLOCKS = {"cpu": (1024, 512), "cuda": (4096, 8192)}


def hidden_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    vocab_size: int,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    block: tuple[int, int] | None = None,
    entropy: bool = False,
    sequence_parallel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-softmax of ``hidden @ weight.T / temperature`` at ``ids``, and the entropy of the softmax where asked for.

    hidden: [T, H], the same on every rank of ``group``; with ``sequence_parallel`` this rank's [T / tp, H] of it,
    gathered here. weight: [V / tp, H], this rank's rows, of hidden's type. ids: [T, C] int64, a token may come twice,
    the same on every rank. Returns [T, C] float32 and [T] float32 (nats) or None, the same on every rank. Products are
    in the type of the inputs, everything else is in float32. Rows of the weight from ``vocab_size`` on are padding:
    they get no probability and no gradient. An id outside the vocabulary has log-prob -inf and no gradient.

    Both results can be differentiated, once. The gradient of ``hidden`` arrives complete: it is summed over ``group``
    here, and with ``sequence_parallel`` each rank receives its positions' part, so the caller neither copies nor
    gathers. Every rank must hold the same gradient of the results, and gets the gradient of its own weight.
    The backward pass makes the logits again, only for positions whose gradient is not zero.

    ``block``: positions and columns of which logits exist at a time, by default ``BLOCKS``. Memory beyond the results
    and the gradients: about one block, [T, H] in float32, and with ``sequence_parallel`` the gathered [T, H].
    Communication does not depend on the block: two reductions of [T] and [T, 1 + C], and one of [T, H] backward.
    """
    head = _Head(vocab_size, group, temperature, block or BLOCKS[hidden.device.type], entropy, sequence_parallel)
    logprobs, entropies = _HiddenLogprobs.apply(hidden, weight, ids, head)
    return logprobs.where((ids >= 0) & (ids < vocab_size), -torch.inf), entropies


@dataclass(frozen=True, slots=True)
class _Head:
    """What one call's forward and backward pass share, besides tensors."""

    vocab_size: int
    group: dist.ProcessGroup
    temperature: float
    block: tuple[int, int]
    entropy: bool
    sequence_parallel: bool

    def first(self, weight: torch.Tensor) -> int:
        """The token of this rank's first row."""
        return self.group.rank() * len(weight)

    def gather(self, hidden: torch.Tensor) -> torch.Tensor:
        """All positions."""
        if not self.sequence_parallel:
            return hidden
        whole = hidden.new_empty(self.group.size() * len(hidden), hidden.shape[1])
        dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.group)
        return whole

    def sum(self, gradient: torch.Tensor) -> torch.Tensor:
        """The opposite of ``gather``: the sum over ranks of [T, H], this rank's positions of it."""
        if not self.sequence_parallel:
            dist.all_reduce(gradient, group=self.group)
            return gradient
        mine = gradient.new_empty(len(gradient) // self.group.size(), gradient.shape[1])
        dist.reduce_scatter_tensor(mine, gradient, group=self.group)
        return mine

    def blocks(self, hidden: torch.Tensor, weight: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
        """Columns, positions and their logits in float32, without padded columns, all positions of a column first.

        The logits may be overwritten; the next block does so.
        """
        columns = min(len(weight), max(0, self.vocab_size - self.first(weight)))
        height, width = self.block
        raw = torch.empty(min(height, len(hidden)) * min(width, columns), dtype=hidden.dtype, device=hidden.device)
        for start in range(0, columns, width):
            chosen = slice(start, min(start + width, columns))
            for top in range(0, len(hidden), height):
                rows = slice(top, min(top + height, len(hidden)))
                size = rows.stop - rows.start, chosen.stop - chosen.start
                logits = torch.mm(hidden[rows], weight[chosen].T, out=raw[: size[0] * size[1]].view(size)).float()
                yield chosen, rows, logits if self.temperature == 1 else logits.div_(self.temperature)


class _HiddenLogprobs(torch.autograd.Function):
    """Saves log(sum(exp(logits))) of each position, nothing of the vocabulary's length."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, head: _Head
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        highest, totals = _local_sums(head.gather(hidden), weight, ids, head)
        overall = highest.clone()
        dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=head.group)

        # A rank whose rows are all padding has the maximum -inf and sums 0. Each id is in one rank's rows.
        totals[:, :2] *= (highest - overall).exp()[:, None]
        local = ids - head.first(weight)
        is_local = (local >= 0) & (local < len(weight))
        totals[:, 2:] = (totals[:, 2:] - overall[:, None]).where(is_local, 0.0)
        dist.all_reduce(totals, group=head.group)

        log_total = totals[:, 0].log()
        normaliser = overall + log_total
        entropies = normaliser - totals[:, 1] / totals[:, 0] if head.entropy else None
        ctx.save_for_backward(hidden, weight, ids, normaliser, entropies)
        ctx.head = head
        return totals[:, 2:] - log_total[:, None], entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, entropy_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        hidden, weight, ids, normaliser, entropies = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        whole = ctx.head.gather(hidden)
        used = (gradient != 0).any(dim=1)
        if entropies is not None:
            used |= entropy_gradient != 0
        per_row = [whole, ids, gradient, normaliser, entropies, entropy_gradient]
        if not used.all():
            per_row = [None if tensor is None else tensor[used] for tensor in per_row]
        by_used, by_weight = _local_gradients(*per_row, weight, ctx.head, wanted)
        if not wanted[0]:
            return None, by_weight, None, None
        by_hidden = by_used
        if len(by_used) < len(whole):
            by_hidden = by_used.new_zeros(whole.shape)
            by_hidden[used] = by_used
        return ctx.head.sum(by_hidden).to(hidden.dtype), by_weight, None, None


def _local_sums(
    hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, head: _Head
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over this rank's columns: the largest logit m [T], and [T, 2 + C]: sum(exp(z - m)), sum(exp(z - m) z), logits.

    The second sum is 0 unless the entropy is asked for. The logit of an id that is not in this rank's rows is 0.
    """
    highest = hidden.new_full((len(hidden),), -torch.inf, dtype=torch.float32)
    totals = hidden.new_zeros(len(hidden), 2 + ids.shape[1], dtype=torch.float32)
    for columns, rows, logits in head.blocks(hidden, weight):
        local, inside = _locate(ids[rows], head.first(weight), columns)
        totals[rows, 2:] += logits.gather(1, local).where(inside, 0.0)
        peak = torch.maximum(highest[rows], logits.amax(dim=1))
        totals[rows, :2] *= (highest[rows] - peak).exp()[:, None]
        highest[rows] = peak
        raw = logits.clone() if head.entropy else None
        exponentials = logits.sub_(peak[:, None]).exp_()
        totals[rows, 0] += exponentials.sum(dim=1)
        if raw is not None:
            totals[rows, 1] += raw.mul_(exponentials).sum(dim=1)
    return highest, totals


def _local_gradients(
    hidden: torch.Tensor,
    ids: torch.Tensor,
    gradient: torch.Tensor,
    normaliser: torch.Tensor,
    entropies: torch.Tensor | None,
    entropy_gradient: torch.Tensor | None,
    weight: torch.Tensor,
    head: _Head,
    wanted: tuple[bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """This rank's columns' part of the gradient of ``hidden``, at least in float32, and the gradient of ``weight``."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    by_hidden = torch.zeros_like(hidden, dtype=wide) if wanted[0] else None
    by_weight = torch.zeros_like(weight) if wanted[1] else None
    by_columns = None
    gradient = gradient / head.temperature
    sums = gradient.sum(dim=1, keepdim=True)
    for columns, rows, logits in head.blocks(hidden, weight):
        # d logprob_c / d logits = one-hot(id_c) - p;  d entropy / d logits = -p (log p + entropy)
        logits.sub_(normaliser[rows, None])
        if entropies is None:
            by_logits = logits.exp_().mul_(-sums[rows])
        else:
            factor = (entropy_gradient[rows, None] / -head.temperature) * (logits + entropies[rows, None])
            by_logits = logits.exp_().mul_(factor.sub_(sums[rows]))
        local, inside = _locate(ids[rows], head.first(weight), columns)
        by_logits = by_logits.scatter_add_(1, local, gradient[rows].where(inside, 0.0)).to(hidden.dtype)
        if by_hidden is not None:
            _add_product(by_hidden[rows], by_logits, weight[columns])
        if by_weight is not None:
            if rows.start == 0:
                by_columns = torch.zeros_like(by_weight[columns], dtype=wide)
            _add_product(by_columns, by_logits.T, hidden[rows])
            if rows.stop == len(hidden):
                by_weight[columns] = by_columns
    return by_hidden, by_weight


def _locate(ids: torch.Tensor, first: int, columns: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each id is among a block's columns (somewhere, if it is not), and whether it is there."""
    local = ids - (first + columns.start)
    width = columns.stop - columns.start
    return local.clamp(0, width - 1), (local >= 0) & (local < width)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, where ``total`` may be of a wider type."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
