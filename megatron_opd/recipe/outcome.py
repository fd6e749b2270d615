"""What a rollout's outcome is worth beside the teacher: rewards, and the controls that calibration is held against.

Arrays in all functions: ``outcomes`` [n] integer (1 correct, 0 incorrect, -1 unknown), ``groups`` [n] integer.
R is the outcome, b a baseline. Graded: the outcome is known. Mixed group: it has a correct and an incorrect rollout.
Pure numpy.
"""

from __future__ import annotations

import numpy as np

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.balance import random_keys, rank_within
from megatron_opd.recipe.labels import check_labels
from megatron_opd.records import Outcome

# The first word of the placebo's hash. Without it, its draw would follow from the one that ``balance`` makes.
_PLACEBO = 1


def group_advantages(outcomes: np.ndarray, groups: np.ndarray, *, scale_by_deviation: bool) -> np.ndarray:
    """Advantage of each rollout's outcome over its group, [n] float64, without a unit.

        A = R - p                          p = pass rate over the group's graded rollouts
        A = (R - p) / sqrt(p (1 - p))      with scale_by_deviation: the population's deviation of R in the group

    0 for unknown outcomes and in groups that are not mixed. The graded ones of a group add to 0.
    Source: scaled GRPO (DeepSeekMath, arXiv 2402.03300), plain Dr. GRPO (arXiv 2503.20783). Raises DataError for labels
    that ``check_labels`` refuses.
    """
    mixed, rates = _pass_rates(outcomes, groups)
    advantages = np.where(mixed, outcomes - rates, 0.0)
    if scale_by_deviation:
        advantages /= np.sqrt(np.where(mixed, rates * (1.0 - rates), 1.0))
    return advantages


def constant_rewards(outcomes: np.ndarray, groups: np.ndarray, *, reward: float, direction: str) -> np.ndarray:
    """The offsets of margin calibration if its weight s(q) were the constant ``reward``: [n] float64, nats per token.

        reward * (R - b)      b: lift 0, drop 1, spread 1/2, balanced the group's pass rate over its graded rollouts

    for the graded rollouts of mixed groups, 0 elsewhere. Calibration also leaves out rollouts of non-finite return;
    give those as unknown. Source: the control of P2 in docs/calibration.md, for Uni-OPD (arXiv 2605.03677).
    Raises ConfigError for an unknown direction, DataError for labels that ``check_labels`` refuses.
    """
    mixed, rates = _pass_rates(outcomes, groups)
    baselines = {"lift": 0.0, "drop": 1.0, "spread": 0.5, "balanced": rates}
    if direction not in baselines:
        raise ConfigError(
            "the direction of the constant reward is unknown", got=direction, expected=" or ".join(baselines)
        )
    return np.where(mixed, reward * (outcomes - baselines[direction]), 0.0)


def placebo_outcomes(outcomes: np.ndarray, groups: np.ndarray, *, seed: int, step: int) -> np.ndarray:
    """Graded outcomes permuted uniformly within each group, [n] of the same dtype; unknown ones stay in place.

    A gain that survives this does not come from knowing which rollout is right, because each group keeps its number of
    correct, incorrect and unknown ones. The permutation is a hash of (seed, step, group, place of the rollout among its
    group's): a resumed run repeats it, and other groups do not change it. Source: the placebo control, this project's.
    Raises DataError for labels that ``check_labels`` refuses. Cost: one sort of the rollouts.
    """
    check_labels(outcomes, groups)
    places = rank_within(groups, np.zeros(len(groups), dtype=np.int64))
    keys = random_keys(_PLACEBO, seed, step, groups, places)
    graded = np.flatnonzero(outcomes != Outcome.UNKNOWN)
    by_place = graded[np.argsort(groups[graded], kind="stable")]
    by_key = graded[np.lexsort((keys[graded], groups[graded]))]
    placebo = outcomes.copy()
    placebo[by_place] = outcomes[by_key]
    return placebo


def sign_agrees(returns: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    """True where a trajectory is kept because its return points the way of its outcome, [n] bool.

        (2 R - 1) G >= 0      G = ``returns`` [n] float, mean token gap in nats per token

    Also true where there is nothing to compare: unknown outcome or non-finite return. Needs no group, so it works with
    one rollout for each prompt. Source: RA-OPD (arXiv 2608.27960). Raises DataError for labels that ``check_labels``
    refuses and for returns that are not a float array of the same length.
    """
    check_labels(outcomes, outcomes)
    if not isinstance(returns, np.ndarray) or returns.shape != outcomes.shape or returns.dtype.kind != "f":
        got = f"{returns.dtype} {returns.shape}" if isinstance(returns, np.ndarray) else type(returns).__name__
        raise DataError("returns cannot be used", got=got, expected=f"a float array of shape {outcomes.shape}")
    signed = np.where(outcomes == Outcome.CORRECT, returns, -returns)
    return (signed >= 0) | (outcomes == Outcome.UNKNOWN) | ~np.isfinite(returns)


def _pass_rates(outcomes: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each rollout is graded and of a mixed group, [n] bool; and the pass rate of its group, [n] float64."""
    check_labels(outcomes, groups)
    ids, group = np.unique(groups, return_inverse=True)
    is_graded = outcomes != Outcome.UNKNOWN
    correct = np.bincount(group[outcomes == Outcome.CORRECT], minlength=len(ids))
    graded = np.bincount(group[is_graded], minlength=len(ids))
    mixed = (correct > 0) & (correct < graded)
    return is_graded & mixed[group], (correct / np.maximum(graded, 1))[group]
