"""Numbers that tell how a step went, from its scored rollouts. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_opd.recipe.advantage import gap_mask, token_gaps
from megatron_opd.records import Outcome, Scored


def rollout_metrics(scored: list[Scored], max_gap: float) -> dict[str, float]:
    """Metrics of one step, overall and by domain (suffix ``/<domain>``). Empty without a rollout.

    reward/correct          share of correct among graded rollouts
    opd/gap                 mean over tokens of log pi_T - log pi_student: minus an estimate of the reverse KL
    opd/abs_gap             mean over tokens of its absolute value
    opd/masked              share of tokens whose gap is masked
    rollout/length          mean response tokens
    rollout/truncated       share of responses cut at the token limit
    rollout/entropy         mean of -log pi_student over sampled tokens: an unbiased estimate of the entropy
    """
    domains = sorted({item.verified.rollout.prompt.domain for item in scored})
    metrics = _metrics(scored, max_gap, "") if scored else {}
    for domain in domains if len(domains) > 1 else []:
        own = [item for item in scored if item.verified.rollout.prompt.domain == domain]
        metrics |= _metrics(own, max_gap, f"/{domain}")
    return metrics


def _metrics(scored: list[Scored], max_gap: float, suffix: str) -> dict[str, float]:
    rollouts = [item.verified.rollout for item in scored]
    gaps = np.concatenate([token_gaps(item.teacher_logprobs, item.verified.rollout.logprobs) for item in scored])
    outcomes = np.array([item.verified.outcome for item in scored])
    graded = outcomes[outcomes != Outcome.UNKNOWN]
    metrics = {
        "opd/gap": gaps.mean(),
        "opd/abs_gap": np.abs(gaps).mean(),
        "opd/masked": 1.0 - gap_mask(gaps, max_gap).mean(),
        "rollout/length": np.mean([len(rollout.token_ids) for rollout in rollouts]),
        "rollout/truncated": np.mean([rollout.finish_reason == "length" for rollout in rollouts]),
        "rollout/entropy": -np.concatenate([rollout.logprobs for rollout in rollouts]).mean(),
    }
    if len(graded):
        metrics["reward/correct"] = (graded == Outcome.CORRECT).mean()
    return {name + suffix: float(value) for name, value in metrics.items()}
