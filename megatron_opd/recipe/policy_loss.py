"""Losses on packed tokens: the clipped policy gradient, that of older tokens, and the forward KL beside them."""

from __future__ import annotations

import torch

from megatron_opd.recipe.forward_kl import forward_kl


def policy_loss(
    logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    weights: torch.Tensor,
    denominator: float,
    clip_low: float,
    clip_high: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the step's loss and of its metrics.

        ratio      = exp(logprobs - behaviour_logprobs)
        token loss = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        loss       = sum(weights * token loss) / denominator

    logprobs [T]: current policy, carries the gradient; behaviour_logprobs [T]: policy that sampled; advantages [T] (A):
    constants; weights [T] >= 0: share of each token; denominator: normaliser of the whole global batch. Values at
    weight 0 are never read, not even non-finite ones. Loss and metrics are sums: adding them over micro-batches and
    ranks gives the loss and the weighted means of the global batch. Metrics: ``advantage``, ``abs_advantage``,
    ``clipped_share`` (tokens whose clipped term is the smaller one, hence without gradient) and
    ``abs_logprob_change`` (|current - behaviour|).

    Source: PPO's clipped surrogate (arXiv 1707.06347, eq. 7) with the token-level teacher-minus-student advantage of
    Uni-OPD (arXiv 2605.03677) and its asymmetric clip of 0.2 and 0.28.
    """
    used = weights > 0
    # Selecting before any arithmetic: 0 * inf would be nan, in the loss and in its gradient.
    change = torch.where(used, logprobs, 0.0) - torch.where(used, behaviour_logprobs, 0.0)
    advantages = torch.where(used, advantages, 0.0)
    share = torch.where(used, weights, 0.0) / denominator

    ratio = change.exp()
    free = ratio * advantages
    clipped = ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -(share * torch.minimum(free, clipped)).sum()
    metrics = {
        "advantage": (share * advantages).sum(),
        "abs_advantage": (share * advantages.abs()).sum(),
        "clipped_share": (share * (clipped < free)).sum(),
        "abs_logprob_change": (share * change.abs()).sum(),
    }
    return loss, {name: value.detach() for name, value in metrics.items()}


def off_policy_loss(
    logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    slopes: torch.Tensor,
    weights: torch.Tensor,
    denominator: float,
    cap: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The share of tokens that older weights drew: truncated importance sampling in place of the clip.

        change   = logprobs - behaviour_logprobs        A now     = A - slope * change
        w        = min(exp(change), cap)                gradient  = -w * (A now) * d logprobs

    All but the gradient of ``logprobs`` is constant; the loss is the sum of weights * -w * (A now) / denominator.
    Arguments as in ``policy_loss``, which takes the other tokens: no token is corrected twice. slopes [T] (``recipe.
    advantage``): A was formed with the behaviour policy's log-prob, and a reverse KL wants the current one. Without
    this the gradient would have grad KL(student || behaviour) too much, which near the optimum undoes the correction:
    it is then that of the old weights. Untruncated, the expectation over the behaviour policy is the gradient of
    KL(student || teacher) at the current weights, on the prefixes that were drawn.
    Metrics, as sums: ``advantage``, ``abs_advantage`` (of A now), ``stale_share`` (weight of these tokens),
    ``importance_weight`` (w) and ``truncated_share`` (where exp(change) > cap).

    Source: truncated importance sampling as in IMPALA (arXiv 1802.01561) and decoupled PPO (arXiv 2110.00641, AReaL
    arXiv 2505.24298) with the current policy as the proximal one, whose clip never binds in one step per batch.
    """
    used = weights > 0
    change = torch.where(used, logprobs.detach(), 0.0) - torch.where(used, behaviour_logprobs, 0.0)
    advantages = torch.where(used, advantages - slopes * change, 0.0)
    share = torch.where(used, weights, 0.0) / denominator

    ratio = change.exp()
    weight = ratio.clamp(max=cap)
    current = torch.where(used, logprobs, 0.0)
    unit = (current - current.detach()).exp()  # 1, with the gradient of the log-prob
    loss = -(share * weight * advantages * unit).sum()
    metrics = {
        "advantage": (share * advantages).sum(),
        "abs_advantage": (share * advantages.abs()).sum(),
        "stale_share": share.sum(),
        "importance_weight": (share * weight).sum(),
        "truncated_share": (share * (ratio > cap)).sum(),
    }
    return loss, metrics


def forward_kl_loss(
    student_topk_logprobs: torch.Tensor,
    teacher_topk_logprobs: torch.Tensor,
    weights: torch.Tensor,
    denominator: float,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This micro-batch's share of the step's forward KL and of its metric, in nats per token.

        loss = sum(weights * forward_kl) / denominator

    student_topk_logprobs [T, K]: current policy at the teacher's K most likely tokens, carries the gradient;
    teacher_topk_logprobs [T, K]: constants; weights [T] >= 0: share of each position, 0 where masked or gated off;
    denominator: normaliser of the whole global batch. Rows of weight 0 are never read, not even non-finite ones. Loss
    and metric are sums, as in ``policy_loss``. Metric: ``forward_kl``, the detached loss.

    Source: the added term of EOPD (arXiv 2603.07079), with ``recipe.topk.entropy_gate`` deciding the weights.
    """
    used = weights > 0
    student = torch.where(used[:, None], student_topk_logprobs, 0.0)
    teacher = torch.where(used[:, None], teacher_topk_logprobs, 0.0)
    share = torch.where(used, weights, 0.0) / denominator
    loss = (share * forward_kl(student, teacher)).sum()
    return loss, {"forward_kl": loss.detach()}
