"""Numbers that tell how a step went, from its rollouts. Pure numpy.

All of a group ``order/`` are taken from returns before calibration: after a shift they look right by construction.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_opd.recipe.order import order_report
from megatron_opd.recipe.repetition import repetition
from megatron_opd.records import Calibrated, Outcome, Verified

REPETITION_WIDTH = 4  # tokens of the n-grams that are looked for twice


def step_diagnostics(
    scored: Sequence[Calibrated], unscored: Sequence[Verified], lost: Sequence[Verified]
) -> dict[str, float]:
    """Metrics of one step, overall and by domain (suffix ``/<domain>``). A share of nothing is left out, never 0.

    scored: rollouts that a teacher scored; unscored: those that balancing dropped before; lost: those whose scoring
    failed. Together they are every rollout of the step.

    reward/correct          share of correct among graded rollouts
    reward/unknown          share of rollouts that could not be graded
    rollout/length          mean response tokens
    rollout/truncated       share of responses cut at the token limit
    rollout/repetition      mean share of 4-grams that occurred before in the same response
    rollout/entropy         mean of -log pi_student over sampled tokens: an unbiased estimate of the entropy
    balance/kept            share of rollouts that balancing kept
    opd/gap                 mean over tokens of the distillation term: minus an estimate of the reverse KL
    opd/abs_gap             mean over tokens of its absolute value
    opd/masked              share of tokens whose gap is masked
    opd/topk_overlap        mean share of common tokens in the top-k rows of student and teacher
    order/auc               chance that a correct rollout's return is above an incorrect one's of its group
    order/consistency       share of mixed groups with every correct return >= every incorrect one
    order/mean_gap          mean over mixed groups of mean correct minus mean incorrect return, nats per token
    order/mixed             share of groups with both outcomes
    calibration/shifted     share of graded rollouts with an offset
    calibration/mean_shift  mean absolute offset of graded rollouts, nats per token
    calibration/trained     share of scored rollouts that are trained on
    """
    verified = [*(item.scored.verified for item in scored), *unscored, *lost]
    out = [item.scored.verified for item in scored if not item.balanced]
    metrics = _metrics(scored, verified, [*unscored, *out], "")
    domains = sorted({_domain(item) for item in verified})
    for domain in domains if len(domains) > 1 else ():
        own = [item for item in scored if _domain(item.scored.verified) == domain]
        parts = [[item for item in part if _domain(item) == domain] for part in (verified, [*unscored, *out])]
        metrics |= _metrics(own, *parts, f"/{domain}")
    return metrics


def _domain(verified: Verified) -> str:
    return verified.rollout.prompt.domain


def _metrics(
    scored: Sequence[Calibrated], verified: Sequence[Verified], balanced_out: Sequence[Verified], suffix: str
) -> dict[str, float]:
    found = _rollouts(verified) if verified else {}
    found |= {"balance/kept": 1.0 - len(balanced_out) / len(verified)} if verified else {}
    found |= _scores(scored) if scored else {}
    return {name + suffix: float(value) for name, value in found.items() if value is not None}


def _rollouts(verified: Sequence[Verified]) -> dict[str, float | None]:
    rollouts = [item.rollout for item in verified]
    outcomes = np.array([item.outcome for item in verified])
    graded = outcomes[outcomes != Outcome.UNKNOWN]
    return {
        "reward/correct": (graded == Outcome.CORRECT).mean() if len(graded) else None,
        "reward/unknown": (outcomes == Outcome.UNKNOWN).mean(),
        "rollout/length": np.mean([len(rollout.token_ids) for rollout in rollouts]),
        "rollout/truncated": np.mean([rollout.finish_reason == "length" for rollout in rollouts]),
        "rollout/repetition": np.mean([repetition(rollout.token_ids, REPETITION_WIDTH) for rollout in rollouts]),
        "rollout/entropy": -np.concatenate([rollout.logprobs for rollout in rollouts]).mean(dtype=np.float64),
    }


def _scores(scored: Sequence[Calibrated]) -> dict[str, float | None]:
    gaps = np.concatenate([item.gaps for item in scored])
    mask = np.concatenate([item.mask for item in scored])
    overlaps = [item.topk_overlap for item in scored if item.topk_overlap is not None]
    returns = np.array([item.mean_gap for item in scored], dtype=np.float64)
    outcomes = np.array([item.scored.verified.outcome for item in scored], dtype=np.int8)
    groups = np.array([item.scored.verified.rollout.group for item in scored], dtype=np.int64)
    offsets = np.abs([item.offset for item in scored])[(outcomes != Outcome.UNKNOWN) & np.isfinite(returns)]
    order = order_report(returns, outcomes, groups)
    return {
        "opd/gap": gaps.mean(dtype=np.float64),
        "opd/abs_gap": np.abs(gaps).mean(dtype=np.float64),
        "opd/masked": 1.0 - mask.mean(),
        "opd/topk_overlap": np.mean(overlaps) if overlaps else None,
        "order/auc": order.auc,
        "order/consistency": order.consistency,
        "order/mean_gap": order.mean_gap,
        "order/mixed": order.mixed_share,
        "calibration/shifted": (offsets > 0).mean() if len(offsets) else None,
        "calibration/mean_shift": offsets.mean() if len(offsets) else None,
        "calibration/trained": np.mean([item.trained for item in scored]),
    }
