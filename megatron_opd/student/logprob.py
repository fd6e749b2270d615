"""Log-probabilities of chosen tokens under a softmax whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_logprob(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """``vocab_parallel_logprobs`` of one token at each position: labels [T] int64, returns [T] float32."""
    return vocab_parallel_logprobs(logits, labels[:, None], vocab_size, group)[:, 0]


def vocab_parallel_logprobs(
    logits: torch.Tensor, ids: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Log-softmax of ``logits`` at ``ids``, in float32, without gathering the vocabulary.

    logits: [T, V / tp], this rank's slice of the V columns, any float type; ids: [T, C] int64, C tokens of each
    position, a token may come twice, the same on every rank of ``group``; returns [T, C] float32, the same on every
    rank. Columns from ``vocab_size`` on are padding: they get no probability and no gradient. An id outside the
    vocabulary has log-prob -inf and no gradient. Gradients can be taken once: the backward pass reuses the saved
    buffer. Cost: one [T, V / tp] float32 buffer whatever C is, two reductions of [T] and [T, 1 + C].
    """
    logprobs = _VocabParallelLogprobs.apply(logits, ids, vocab_size, group)
    return logprobs.where((ids >= 0) & (ids < vocab_size), -torch.inf)


class _VocabParallelLogprobs(torch.autograd.Function):
    """One [T, V / tp] float32 buffer lives from forward to backward: logits, then probabilities, then gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, ids: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        columns = logits.shape[-1]
        first = dist.get_rank(group) * columns
        buffer = logits.to(torch.float32, copy=True)
        buffer[:, max(0, vocab_size - first) :] = -torch.inf

        highest = buffer.amax(dim=-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        buffer.sub_(highest[:, None])

        local = ids - first
        is_local = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        targets = buffer.gather(1, local).where(is_local, 0.0)

        total = buffer.exp_().sum(dim=-1, keepdim=True)
        sums = torch.cat([total, targets], dim=1)
        dist.all_reduce(sums, group=group)
        total, targets = sums[:, :1], sums[:, 1:]

        buffer.div_(total)
        ctx.save_for_backward(buffer, local, is_local)
        ctx.logits_dtype = logits.dtype
        return targets - total.log()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        buffer, local, is_local = ctx.saved_tensors
        # d logprob_c / d logits = one-hot(id_c) - softmax; padding stays 0 because its probability is 0.
        buffer.mul_(-gradient.sum(dim=-1, keepdim=True))
        buffer.scatter_add_(1, local, gradient.where(is_local, 0.0))
        return buffer.to(ctx.logits_dtype), None, None, None
