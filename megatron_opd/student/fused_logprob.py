"""Log-probabilities of chosen tokens, or a loss of them, straight from hidden states: never all logits at once.

T positions of this rank's rows, H hidden size, V columns of the output weight over all tensor-parallel ranks (padding
included), C ids of each position.

A backward pass that is told the gradient of each log-prob has to make the logits again: four matrix products, where
whoever keeps all logits has three. Where the loss is known in the forward pass, logits of a few positions at a time are
kept from their log-probs to their gradients, and three products do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import tee
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megatron_opd.student.logit_blocks import (
    BLOCKS,
    Block,
    Projection,
    Upstream,
    add_gradients,
    at_least_float32,
    score,
)

PART = 512  # positions whose logits are kept from log-probs to gradients

Loss = Callable[[torch.Tensor, slice], torch.Tensor]


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
    and the gradients: about two blocks, [T, H] in float32, and with ``sequence_parallel`` the gathered [T, H].
    Communication does not depend on the block: two reductions of [T] and [T, 2 + C], and one of [T, H] backward.
    """
    block = block or BLOCKS[hidden.device.type]
    projection = Projection(vocab_size, group, temperature, block, sequence_parallel)
    logprobs, entropies = _HiddenLogprobs.apply(hidden, weight, ids, projection, entropy)
    return _known(logprobs, ids, projection), entropies


def hidden_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    loss: Loss,
    vocab_size: int,
    group: dist.ProcessGroup,
    *,
    temperature: float = 1.0,
    part: int = PART,
    sequence_parallel: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss of the log-probs of ``hidden_logprobs``, with the same gradients; and the log-probs, without gradient.

    loss: from the log-probs [P, C] of some positions, and the slice of all T that they are, to their share of the loss,
    a scalar; the loss is the sum of the shares. Every rank must compute the same. The rest is as in
    ``hidden_logprobs``. Gradients are made here; the backward pass, of which there can be one, only scales them.

    ``part``: positions gone through at a time. Memory beyond the results and the gradients: [part, V / tp] in float32
    and what ``hidden_logprobs`` takes; two reductions of each part. A weight of half precision would have its gradient
    rounded at each part, so there all positions are one part, whose logits are made again and not kept.
    """
    height, width = BLOCKS[hidden.device.type]
    if weight.dtype == at_least_float32(weight):
        height, width = part, max(1, height * width // part)
    projection = Projection(vocab_size, group, temperature, (height, width), sequence_parallel)
    return _HiddenLoss.apply(hidden, weight, ids, projection, loss)


class _HiddenLogprobs(torch.autograd.Function):
    """Saves log(sum(exp(logits))) of each position, nothing of the vocabulary's length."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, projection: Projection, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        blocks = projection.blocks(projection.gather(hidden), weight)
        scores = score(blocks, weight, ids, projection, entropy=entropy)
        ctx.save_for_backward(hidden, weight, ids, scores.normaliser, scores.entropies)
        ctx.projection = projection
        return scores.logprobs, scores.entropies

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, entropy_gradient: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        hidden, weight, ids, normaliser, entropies = ctx.saved_tensors
        whole = ctx.projection.gather(hidden)
        gradients = _zeros(whole, weight, ctx.needs_input_grad)
        upstream = Upstream(whole, ids, gradient, normaliser, entropies, entropy_gradient)
        _add_used(upstream, weight, ctx.projection, *gradients)
        return *_complete(hidden, ctx.projection, *gradients), None, None, None


class _HiddenLoss(torch.autograd.Function):
    """Saves the gradients."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, projection: Projection, loss: Loss
    ) -> tuple[torch.Tensor, torch.Tensor]:
        whole = projection.gather(hidden)
        by_hidden, by_weight = _zeros(whole, weight, ctx.needs_input_grad)
        keep = weight.dtype == at_least_float32(weight)
        part = projection.block[0] if keep else len(whole)
        room = whole.new_empty(min(part, len(whole)) * len(weight)) if keep else None
        total, found = torch.zeros((), device=whole.device), []
        for start in range(0, len(whole), part):
            at = slice(start, min(start + part, len(whole)))
            blocks, kept = projection.blocks(whole[at], weight, room), None
            if keep:
                blocks, kept = tee(blocks)
            scores = score(blocks, weight, ids[at], projection, entropy=False)
            with torch.enable_grad():
                leaf = scores.logprobs.requires_grad_()
                logprobs = _known(leaf, ids[at], projection)
                share = loss(logprobs, at)
                (gradient,) = torch.autograd.grad(share, leaf)
            total += share.detach()
            found.append(logprobs.detach())
            upstream = Upstream(whole[at], ids[at], gradient, scores.normaliser)
            _add_used(upstream, weight, projection, None if by_hidden is None else by_hidden[at], by_weight, kept)
        ctx.save_for_backward(*_complete(hidden, projection, by_hidden, by_weight))
        logprobs = torch.cat(found)
        ctx.mark_non_differentiable(logprobs)
        return total, logprobs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor, unused: torch.Tensor
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        scaled = (None if saved is None else saved.mul_(gradient) for saved in ctx.saved_tensors)
        return *scaled, None, None, None


def _known(logprobs: torch.Tensor, ids: torch.Tensor, projection: Projection) -> torch.Tensor:
    """-inf where the id is not in the vocabulary."""
    return logprobs.where((ids >= 0) & (ids < projection.vocab_size), -torch.inf)


def _zeros(
    whole: torch.Tensor, weight: torch.Tensor, needed: tuple[bool, ...]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Where the gradients of all positions and of the weight are added up, if they are needed."""
    by_hidden = torch.zeros_like(whole, dtype=at_least_float32(whole)) if needed[0] else None
    return by_hidden, torch.zeros_like(weight) if needed[1] else None


def _add_used(
    upstream: Upstream,
    weight: torch.Tensor,
    projection: Projection,
    by_hidden: torch.Tensor | None,
    by_weight: torch.Tensor | None,
    kept: Iterable[Block] | None = None,
) -> None:
    """Add the gradients of positions that have one; without ``kept``, the logits of these are made again."""
    used = upstream.used()
    rows = upstream.only(used)
    some = rows is not upstream
    if kept is None:
        blocks = projection.blocks(rows.hidden, weight)
    elif some:
        blocks = ((columns, slice(0, len(rows.hidden)), logits[used]) for columns, _, logits in kept)
    else:
        blocks = kept
    into = torch.zeros_like(rows.hidden, dtype=by_hidden.dtype) if some and by_hidden is not None else by_hidden
    add_gradients(blocks, rows, weight, projection, into, by_weight)
    if into is not by_hidden:
        by_hidden[used] = into


def _complete(
    hidden: torch.Tensor, projection: Projection, by_hidden: torch.Tensor | None, by_weight: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of this rank's positions and weight, from what every rank's columns add to all positions."""
    return None if by_hidden is None else projection.sum(by_hidden).to(hidden.dtype), by_weight
