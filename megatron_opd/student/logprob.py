"""Log-probability of the label under a softmax whose vocabulary is split over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def vocab_parallel_logprob(
    logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> torch.Tensor:
    """Log-softmax of ``logits`` at ``labels``, in float32, without gathering the vocabulary.

    logits: [T, V / tp], this rank's slice of the V columns, any float type; labels: [T] int64, the same on every rank
    of ``group``; returns [T] float32, the same on every rank. Columns from ``vocab_size`` on are padding: they get no
    probability and no gradient. Gradients can be taken once: the backward pass reuses the saved buffer.
    """
    return _VocabParallelLogprob.apply(logits, labels, vocab_size, group)


class _VocabParallelLogprob(torch.autograd.Function):
    """One [T, V / tp] float32 buffer lives from forward to backward: logits, then probabilities, then gradient."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
    ) -> torch.Tensor:
        columns = logits.shape[-1]
        first = dist.get_rank(group) * columns
        buffer = logits.to(torch.float32, copy=True)
        buffer[:, max(0, vocab_size - first) :] = -torch.inf

        highest = buffer.amax(dim=-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        buffer.sub_(highest[:, None])

        local = labels - first
        is_local = (local >= 0) & (local < columns)
        local = local.clamp(0, columns - 1)
        target = buffer.gather(1, local[:, None])[:, 0].where(is_local, 0.0)

        total = buffer.exp_().sum(dim=-1)
        sums = torch.stack([total, target])
        dist.all_reduce(sums, group=group)
        total, target = sums

        buffer.div_(total[:, None])
        ctx.save_for_backward(buffer, local, is_local)
        ctx.logits_dtype = logits.dtype
        return target - total.log()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        buffer, local, is_local = ctx.saved_tensors
        # d logprob / d logits = one-hot(label) - softmax; padding stays 0 because its probability is 0.
        buffer.neg_().scatter_add_(1, local[:, None], is_local[:, None].to(buffer.dtype))
        buffer.mul_(gradient[:, None])
        return buffer.to(ctx.logits_dtype), None, None, None
