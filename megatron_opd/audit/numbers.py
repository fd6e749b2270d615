"""The numbers of one set of rollouts: a run, a step, a domain. No model, no I/O.

All of the teacher's order are taken from the returns **before** calibration: a shift makes them look right by
construction. A number that nothing can be said about is None ("n/a" on the page), never 0: the order where no group is
mixed, the correct ratio where nothing was graded. docs/audit.md tells how to read each of them.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_opd.audit.read import Rollouts
from megatron_opd.recipe.margin import Sides, arrange, dense, deviations
from megatron_opd.recipe.order import OrderReport, group_order, order_report
from megatron_opd.records import Outcome


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everything that is said about a set of whole groups. Shares are in [0, 1], gaps and offsets in nats per token.

    Graded: outcome known. Scored: a teacher's log-probs are there. Mixed: a group with a correct and an incorrect
    rollout that are graded and scored.
    """

    rollouts: int
    groups: int
    correct: int
    incorrect: int
    unknown: int
    trained: int
    filtered: int
    balanced_out: int
    dropped: int
    correct_ratio: float | None  # of the graded ones
    correct_error: float | None  # its standard error over groups; None for fewer than two graded ones
    unknown_share: float | None
    kept_share: float | None  # of all, by balancing
    filtered_share: float | None  # of what balancing kept and a teacher scored, by margin mask and sign filter
    dropped_share: float | None  # of all
    length: float | None  # mean tokens
    truncated_share: float | None
    repetition: float | None  # mean share of 4-grams that occurred before in the same response
    entropy: float | None  # mean of -log pi_student over the sampled tokens, nats
    gap: float | None  # mean distillation term of all scored tokens: minus an estimate of the reverse KL
    masked_share: float | None  # of the scored tokens
    topk_overlap: float | None
    return_correct: float | None  # mean G
    return_incorrect: float | None
    order: OrderReport  # auc, consistency, mean_gap, mixed_share and counts
    auc_error: float | None  # standard error over groups; None for fewer than two mixed ones
    chance_consistency: float | None  # what consistency would be if the order were drawn by lot
    deviation: float | None  # mean over mixed groups of the standard deviation of G in the group
    mean_gap_after: float | None  # order.mean_gap after the shift: what calibration did, not what the teacher thinks
    changed_groups: float | None  # share of mixed groups in which something was shifted or filtered
    shifted: float | None  # share of graded and scored rollouts with an offset
    mean_offset: float | None  # mean |offset| of graded and scored rollouts
    max_offset: float | None
    depth: list[float | None]  # mean gap of the tokens in the first, second, third, last quarter of the responses
    depth_correct: list[float | None]
    depth_incorrect: list[float | None]


def numbers(rollouts: Rollouts) -> Numbers:
    """All numbers of whole groups of rollouts."""
    states = Counter(rollouts.state.tolist())
    outcomes = Counter(rollouts.outcome.tolist())
    count, tokens, scored_tokens = len(rollouts), int(rollouts.tokens.sum()), int(rollouts.scored_tokens.sum())
    correct, incorrect = outcomes[Outcome.CORRECT], outcomes[Outcome.INCORRECT]
    return Numbers(
        rollouts=count,
        groups=len(np.unique(rollouts.group)),
        correct=correct,
        incorrect=incorrect,
        unknown=outcomes[Outcome.UNKNOWN],
        trained=states["trained"],
        filtered=states["filtered"],
        balanced_out=states["balanced_out"],
        dropped=states["dropped"],
        correct_ratio=_ratio(correct, correct + incorrect),
        correct_error=_correct_error(rollouts),
        unknown_share=_ratio(outcomes[Outcome.UNKNOWN], count),
        kept_share=_ratio(count - states["balanced_out"], count),
        filtered_share=_ratio(states["filtered"], states["filtered"] + states["trained"]),
        dropped_share=_ratio(states["dropped"], count),
        length=_ratio(tokens, count),
        truncated_share=_mean(rollouts.truncated),
        repetition=_mean(rollouts.repetition),
        entropy=_ratio(rollouts.surprise.sum(), tokens),
        gap=_ratio(rollouts.gap_sum.sum(), scored_tokens),
        masked_share=_ratio(rollouts.masked_tokens.sum(), scored_tokens),
        topk_overlap=_mean(rollouts.topk_overlap[np.isfinite(rollouts.topk_overlap)]),
        depth=_depth(rollouts),
        depth_correct=_depth(rollouts.take(rollouts.outcome == Outcome.CORRECT)),
        depth_incorrect=_depth(rollouts.take(rollouts.outcome == Outcome.INCORRECT)),
        **_order(rollouts),
    )


def graded_sides(rollouts: Rollouts) -> tuple[np.ndarray, Sides]:
    """Indices of the graded and scored rollouts [k], and the mixed groups among them; ``Sides`` counts in these k."""
    graded = np.flatnonzero((rollouts.outcome != Outcome.UNKNOWN) & np.isfinite(rollouts.mean_gap))
    _, unit = np.unique(rollouts.group[graded], return_inverse=True)
    returns = rollouts.mean_gap[graded]
    return graded, arrange(returns, rollouts.outcome[graded], unit, dense(returns))


def _order(rollouts: Rollouts) -> dict[str, object]:
    """The fields of ``Numbers`` that compare returns, or offsets, of graded rollouts."""
    graded, sides = graded_sides(rollouts)
    offsets, filtered = np.abs(rollouts.offset[graded]), rollouts.state[graded] == "filtered"
    moved = (offsets > 0) | filtered
    changed = np.logical_or.reduceat(moved[sides.index], sides.starts[0::2])
    own, outcomes = rollouts.mean_gap[graded], rollouts.outcome[graded]
    report = order_report(rollouts.mean_gap, rollouts.outcome, rollouts.group)
    after = order_report(rollouts.mean_gap + rollouts.offset, rollouts.outcome, rollouts.group)
    return {
        "return_correct": _mean(own[outcomes == Outcome.CORRECT]),
        "return_incorrect": _mean(own[outcomes == Outcome.INCORRECT]),
        "order": report,
        "auc_error": _auc_error(rollouts),
        "chance_consistency": _chance(sides),
        "deviation": _mean(deviations(sides)),
        "mean_gap_after": after.mean_gap,
        "changed_groups": _mean(changed),
        "shifted": _mean(offsets > 0),
        "mean_offset": _mean(offsets),
        "max_offset": float(offsets.max()) if len(offsets) else None,
    }


def _correct_error(rollouts: Rollouts) -> float | None:
    ids, group = np.unique(rollouts.group, return_inverse=True)
    correct = np.bincount(group, rollouts.outcome == Outcome.CORRECT, len(ids))
    graded = np.bincount(group, rollouts.outcome != Outcome.UNKNOWN, len(ids))
    return _error_over_groups(correct, graded)


def _auc_error(rollouts: Rollouts) -> float | None:
    rows = group_order(rollouts.mean_gap, rollouts.outcome, rollouts.group)
    return _error_over_groups(rows.wins, rows.pairs)


def _error_over_groups(parts: np.ndarray, wholes: np.ndarray) -> float | None:
    """Standard error of r = sum of parts / sum of wholes, both [g], by linearisation over the m groups with a whole:

        sqrt(m / (m - 1) * sum over groups of (part - r * whole)^2) / sum of wholes

    Rollouts of a group resemble each other, so counting them as independent would promise too much.
    """
    groups, total = int((wholes > 0).sum()), wholes.sum()
    if groups < 2:
        return None
    residuals = parts - parts.sum() / total * wholes
    return math.sqrt(groups / (groups - 1) * float(residuals @ residuals)) / float(total)


def _chance(sides: Sides) -> float | None:
    """Mean over mixed groups of 1 / binomial(n, correct): the chance that a random order separates the outcomes."""
    sizes = Counter(zip(sides.counts[0::2].tolist(), sides.counts[1::2].tolist(), strict=True))
    total = sum(count / math.comb(incorrect + correct, correct) for (incorrect, correct), count in sizes.items())
    return total / sizes.total() if sizes else None


def _depth(rollouts: Rollouts) -> list[float | None]:
    sums, counts = rollouts.depth_sums.sum(axis=0), rollouts.depth_counts.sum(axis=0)
    return [_ratio(total, count) for total, count in zip(sums, counts, strict=True)]


def _ratio(part: float, whole: float) -> float | None:
    """None for 0 / 0, and where a number that is not finite got into the sum."""
    return float(part / whole) if whole and math.isfinite(part) else None


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
