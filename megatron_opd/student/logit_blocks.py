"""Logits block by block: log-probs under a softmax whose vocabulary is split over ranks, and their gradients.

T positions of this rank's rows, H hidden size, V columns of the output weight over all tensor-parallel ranks (padding
included), C ids of each position. A block is some positions by some columns, small enough to stay in a CPU's cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

# Positions and columns of a block: in cache on a CPU, measured; large enough to fill a GPU, an estimate.
BLOCKS = {"cpu": (1024, 512), "cuda": (4096, 8192)}

Block = tuple[slice, slice, torch.Tensor]  # columns, positions, and their logits in float32


@dataclass(frozen=True, slots=True)
class Projection:
    """How logits come from hidden states and weight."""

    vocab_size: int  # columns from here on are padding
    group: dist.ProcessGroup  # ranks that share the columns
    temperature: float
    block: tuple[int, int]
    sequence_parallel: bool  # each rank of the group holds a part of the positions

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

    def blocks(self, hidden: torch.Tensor, weight: torch.Tensor, room: torch.Tensor | None = None) -> Iterator[Block]:
        """The logits without padded columns, all positions of a column first.

        They may be overwritten. The next block does so, unless ``room``, [T * V / tp] of hidden's type, holds them all.
        """
        columns = min(len(weight), max(0, self.vocab_size - self.first(weight)))
        height, width = self.block
        keep = room is not None
        if not keep:
            room = hidden.new_empty(min(height, len(hidden)) * min(width, columns))
        begin = 0
        for start in range(0, columns, width):
            chosen = slice(start, min(start + width, columns))
            for top in range(0, len(hidden), height):
                rows = slice(top, min(top + height, len(hidden)))
                size = rows.stop - rows.start, chosen.stop - chosen.start
                out = room[begin : begin + size[0] * size[1]].view(size)
                logits = torch.mm(hidden[rows], weight[chosen].T, out=out).float()
                yield chosen, rows, logits if self.temperature == 1 else logits.div_(self.temperature)
                begin += out.numel() if keep else 0


@dataclass(frozen=True, slots=True)
class Scores:
    """What the softmax gives, the same on every rank."""

    logprobs: torch.Tensor  # [T, C] float32; of an id outside the vocabulary, some number
    normaliser: torch.Tensor  # [T] float32, log(sum(exp(logits)))
    entropies: torch.Tensor | None  # [T] float32, nats


def score(
    blocks: Iterable[Block], weight: torch.Tensor, ids: torch.Tensor, projection: Projection, *, entropy: bool
) -> Scores:
    """Log-probs at ``ids`` [T, C] int64, and the entropy where asked for; leaves the blocks as they are."""
    highest, totals = _local_sums(blocks, weight, ids, projection, entropy)
    overall = highest.clone()
    dist.all_reduce(overall, op=dist.ReduceOp.MAX, group=projection.group)

    # A rank whose rows are all padding has the maximum -inf and sums 0. Each id is in one rank's rows.
    totals[:, :2] *= (highest - overall).exp()[:, None]
    local = ids - projection.first(weight)
    is_local = (local >= 0) & (local < len(weight))
    totals[:, 2:] = (totals[:, 2:] - overall[:, None]).where(is_local, 0.0)
    dist.all_reduce(totals, group=projection.group)

    log_total = totals[:, 0].log()
    normaliser = overall + log_total
    entropies = normaliser - totals[:, 1] / totals[:, 0] if entropy else None
    return Scores(totals[:, 2:] - log_total[:, None], normaliser, entropies)


def _local_sums(
    blocks: Iterable[Block], weight: torch.Tensor, ids: torch.Tensor, projection: Projection, entropy: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Over this rank's columns: the largest logit m [T], and [T, 2 + C]: sum(exp(z - m)), sum(exp(z - m) z), logits.

    The second sum is 0 unless the entropy is asked for. The logit of an id that is not in this rank's rows is 0.
    """
    highest = torch.full((len(ids),), -torch.inf, device=weight.device)
    totals = torch.zeros(len(ids), 2 + ids.shape[1], device=weight.device)
    for columns, rows, logits in blocks:
        local, inside = _locate(ids[rows], projection.first(weight), columns)
        totals[rows, 2:] += logits.gather(1, local).where(inside, 0.0)
        peak = torch.maximum(highest[rows], logits.amax(dim=1))
        totals[rows, :2] *= (highest[rows] - peak).exp()[:, None]
        highest[rows] = peak
        exponentials = (logits - peak[:, None]).exp_()
        totals[rows, 0] += exponentials.sum(dim=1)
        if entropy:
            totals[rows, 1] += exponentials.mul_(logits).sum(dim=1)
    return highest, totals


@dataclass(frozen=True, slots=True)
class Upstream:
    """Positions, and the gradients of what ``score`` gave for them."""

    hidden: torch.Tensor  # [T, H]
    ids: torch.Tensor  # [T, C]
    gradient: torch.Tensor  # [T, C] of the log-probs
    normaliser: torch.Tensor  # [T]
    entropies: torch.Tensor | None = None  # [T]
    entropy_gradient: torch.Tensor | None = None  # [T]

    def used(self) -> torch.Tensor:
        """Which positions have a gradient, [T] bool."""
        used = (self.gradient != 0).any(dim=1)
        return used if self.entropies is None else used | (self.entropy_gradient != 0)

    def only(self, used: torch.Tensor) -> Upstream:
        """Some of the positions."""
        if used.all():
            return self
        tensors = (getattr(self, name) for name in self.__slots__)
        return Upstream(*(None if tensor is None else tensor[used] for tensor in tensors))


def add_gradients(
    blocks: Iterable[Block],
    upstream: Upstream,
    weight: torch.Tensor,
    projection: Projection,
    by_hidden: torch.Tensor | None,
    by_weight: torch.Tensor | None,
) -> None:
    """Add this rank's columns' part of the gradient to ``by_hidden`` [T, H], and the gradient of ``weight`` [V / tp, H]
    to ``by_weight``, rounded once to its type; overwrites the blocks, which are those of the positions of ``upstream``.
    """
    hidden, by_columns = upstream.hidden, None
    gradient = upstream.gradient / projection.temperature
    sums = gradient.sum(dim=1, keepdim=True)
    for columns, rows, logits in blocks:
        # d logprob_c / d logits = one-hot(id_c) - p;  d entropy / d logits = -p (log p + entropy)
        logits.sub_(upstream.normaliser[rows, None])
        if upstream.entropies is None:
            by_logits = logits.exp_().mul_(-sums[rows])
        else:
            factor = upstream.entropy_gradient[rows, None] / -projection.temperature
            factor = factor * (logits + upstream.entropies[rows, None])
            by_logits = logits.exp_().mul_(factor.sub_(sums[rows]))
        local, inside = _locate(upstream.ids[rows], projection.first(weight), columns)
        by_logits = by_logits.scatter_add_(1, local, gradient[rows].where(inside, 0.0)).to(hidden.dtype)
        if by_hidden is not None:
            _add_product(by_hidden[rows], by_logits, weight[columns])
        if by_weight is not None:
            if rows.start == 0:
                by_columns = by_weight[columns].to(at_least_float32(weight))
            _add_product(by_columns, by_logits.T, hidden[rows])
            if rows.stop == len(hidden) and by_columns.dtype != by_weight.dtype:
                by_weight[columns] = by_columns


def at_least_float32(tensor: torch.Tensor) -> torch.dtype:
    """The type to add up products of ``tensor`` in."""
    return torch.promote_types(tensor.dtype, torch.float32)


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
