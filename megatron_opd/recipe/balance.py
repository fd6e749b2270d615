"""Online correctness-aware balancing: which rollouts of a step stay, so that correct and incorrect are in proportion.

Source: Uni-OPD (arXiv 2605.03677), "sample filter" with ratio 1:1 per prompt group. The paper names a tolerance
without its value; the band, the rounding and the policies below are this project's. Pure numpy.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.config import BalanceConfig
from megatron_opd.recipe.labels import check_labels
from megatron_opd.records import Outcome

# Share by which the band is widened: rounded bounds would shut out counts that lie on them, such as 3:9 for a ratio of
# 0.4 and a tolerance of 0.2 (0.4 / 1.2 = 1 / 3). Less than what separates two ratios of counts up to 10,000.
_SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class BalanceReport:
    """Counts of one step, before and after balancing. Groups are prompt groups in both scopes."""

    correct_before: int
    incorrect_before: int
    unknown_before: int
    correct_after: int
    incorrect_after: int
    unknown_after: int
    groups: int  # prompt groups with any rollout
    one_sided_groups: int  # of these: only correct or only incorrect, unknown aside
    touched_groups: int  # of these: lost a rollout
    out_of_band: int  # mixed groups (scope "global": 1, the step) whose counts reach no ratio of the band

    @property
    def kept_share(self) -> float:
        """Kept rollouts / all rollouts; 1 for a step without a rollout."""
        before = self.correct_before + self.incorrect_before + self.unknown_before
        return (self.correct_after + self.incorrect_after + self.unknown_after) / before if before else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Balance:
    """Result of ``balance``."""

    keep: np.ndarray  # [n] bool: true where the rollout is scored, trained on and counted
    report: BalanceReport


@dataclass(frozen=True, slots=True)
class Refill:
    """What a step lacks. ``prompts`` is an estimate from this step's kept share, ``rollouts`` is exact."""

    rollouts: int
    prompts: int


def balance(outcomes: np.ndarray, groups: np.ndarray, options: BalanceConfig, seed: int, step: int) -> Balance:
    """Which rollouts stay. ``outcomes`` [n] integer (1, 0, -1 as in ``Outcome``), ``groups`` [n] integer.

    ``kept_counts`` says how many of each class stay. Which ones is drawn uniformly by a hash of ``(seed, step, group,
    place of the rollout among its group's)``: a resumed run repeats the draw, and in scope "group" it does not depend
    on other groups, nor on how the groups' rollouts are interleaved. Unknown outcomes follow ``options.unknown`` alone,
    also in a one-sided group that is dropped. Scope "global" treats the step as one group, which may leave single
    groups without a class. Raises DataError (a ValueError) for labels that ``check_labels`` refuses.
    """
    check_labels(outcomes, groups)
    ids, group = np.unique(groups, return_inverse=True)
    pool = group if options.scope == "group" else np.zeros_like(group)
    before = _class_counts(outcomes, pool, len(ids))
    limit = np.zeros_like(before)
    limit[Outcome.CORRECT], limit[Outcome.INCORRECT] = kept_counts(
        before[Outcome.CORRECT], before[Outcome.INCORRECT], options
    )
    limit[Outcome.UNKNOWN] = before[Outcome.UNKNOWN] if options.unknown == "keep" else 0

    keys = random_keys(seed, step, groups, rank_within(group, np.zeros(len(group), dtype=np.int64)))
    keep = rank_within(pool * len(Outcome) + outcomes % len(Outcome), keys) < limit[outcomes, pool]
    return Balance(keep, _report(outcomes, group, len(ids), keep, limit, options))


def kept_counts(correct: np.ndarray, incorrect: np.ndarray, options: BalanceConfig) -> tuple[np.ndarray, np.ndarray]:
    """Kept correct and kept incorrect [g] int64 of groups with ``correct`` and ``incorrect`` [g] graded rollouts.

    For a group with a correct and b incorrect, both >= 1, over whole numbers 1 <= a' <= a and 1 <= b' <= b:

        some a' / b' lies in the band   the pair of the band with the largest a' + b' (there is only one)
        none does                       the pair with the smallest |log(a' / b') - log(ratio)|, then the largest a' + b'

    Nothing is truncated before it is compared, and a mixed group stays mixed. Ratio 2 on 1:15 keeps 1:1, ratio 0.5 on
    15:1 keeps 1:1, ratio 1.2 on 2:14 keeps 2:2. At tolerance 0 the ratio is met exactly where it can be, which is
    dear for a ratio that is no small fraction: 1.2 on 8:8 keeps 6:5, with a tolerance of 0.2 it keeps all 16.

    A one-sided group keeps all ("keep"), at most ``one_sided_samples`` ("subsample") or none ("drop"). Cost: O(n) time
    and memory in the number of rollouts.
    """
    kept_correct, kept_incorrect = correct.astype(np.int64), incorrect.astype(np.int64)
    low, high = ratio_band(options)
    mixed = (kept_correct > 0) & (kept_incorrect > 0)
    if options.one_sided != "keep":
        most = options.one_sided_samples if options.one_sided == "subsample" else 0
        kept_correct = np.where(mixed, kept_correct, np.minimum(kept_correct, most))
        kept_incorrect = np.where(mixed, kept_incorrect, np.minimum(kept_incorrect, most))
    outside = mixed & ~_inside(kept_correct, kept_incorrect, low, high)
    if outside.any():
        kept_correct[outside], kept_incorrect[outside] = _closest_counts(
            kept_correct[outside], kept_incorrect[outside], options
        )
    return kept_correct, kept_incorrect


def ratio_band(options: BalanceConfig) -> tuple[float, float]:
    """Lowest and highest correct / incorrect that count as balanced."""
    widen = 1.0 + options.tolerance
    return options.ratio / widen * (1.0 - _SLACK), options.ratio * widen * (1.0 + _SLACK)


def refill_needed(keep: np.ndarray, target: int, samples_per_prompt: int = 1) -> Refill:
    """What must be sampled so that a step trains on ``target`` rollouts after balancing kept ``keep`` [n] bool.

        rollouts = max(0, target - kept)
        prompts  = ceil(rollouts / (samples_per_prompt * kept / n))

    Where nothing was kept there is no share to extrapolate, and prompts = ceil(rollouts / samples_per_prompt), the
    least that can do. Raises ValueError for a negative target or fewer than one sample per prompt.
    """
    if target < 0 or samples_per_prompt < 1:
        raise ValueError(f"got target {target}, samples_per_prompt {samples_per_prompt}; expected >= 0 and >= 1")
    kept = int(np.count_nonzero(keep))
    rollouts = max(0, target - kept)
    numerator, denominator = (
        (rollouts * len(keep), samples_per_prompt * kept) if kept else (rollouts, samples_per_prompt)
    )
    return Refill(rollouts=rollouts, prompts=-(-numerator // denominator))


def random_keys(*words: int | np.ndarray) -> np.ndarray:
    """A hash of the words, [n] uint64, uniform: the same on every machine and for every version of numpy.

    words: integers or integer arrays [n], at least one array. Each is absorbed by the finaliser of SplitMix64 (Steele,
    Lea and Flood, OOPSLA 2014), so that no key depends on the other rows.
    """
    keys = np.zeros(1, dtype=np.uint64)  # an array even for lone integers: numpy wraps arrays silently, scalars not
    for word in words:
        absorbed = np.array([word % 2**64], dtype=np.uint64) if isinstance(word, int) else word.astype(np.uint64)
        keys = (keys ^ absorbed) + np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return keys


def rank_within(parts: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Place (0, 1, ...) of each row among the rows of its part, by ascending key and then by position: [n] int64."""
    order = np.lexsort((keys, parts))
    ordered = parts[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)])
    sizes = np.diff(np.append(starts, len(ordered)))
    ranks = np.empty(len(ordered), dtype=np.int64)
    ranks[order] = np.arange(len(ordered)) - np.repeat(starts, sizes)
    return ranks


def _closest_counts(
    correct: np.ndarray, incorrect: np.ndarray, options: BalanceConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The rule of ``kept_counts`` for mixed groups [g], g >= 1, by trying every b' of every group at once.

    In the band the total min(a, floor(high * b')) + b' grows with b', so the largest b' that has an a' wins.
    """
    low, high = ratio_band(options)
    starts = np.cumsum(incorrect) - incorrect
    owner = np.repeat(np.arange(len(incorrect)), incorrect)
    tried = np.arange(len(owner)) - starts[owner] + 1  # b' = 1 .. b
    available = correct[owner].astype(np.float64)

    most = np.minimum(available, np.floor(high * tried))
    fits = (most >= 1) & (most >= low * tried)
    reached = np.maximum.reduceat(np.where(fits, tried, 0), starts)

    # For each b' the nearest a' is one of the two whole numbers around ratio * b', as far as they exist.
    below = np.clip(np.floor(options.ratio * tried), 1, available)
    above = np.minimum(below + 1, available)
    nearest = np.where(_distance(above, tried, options) <= _distance(below, tried, options), above, below)
    distance = _distance(nearest, tried, options)
    smallest = np.minimum.reduceat(distance, starts)
    fallback = np.maximum.reduceat(np.where(distance == smallest[owner], tried, 0), starts)

    kept_incorrect = np.where(reached > 0, reached, fallback)
    place = starts + kept_incorrect - 1
    return np.where(reached > 0, most[place], nearest[place]).astype(np.int64), kept_incorrect


def _distance(correct: np.ndarray, incorrect: np.ndarray, options: BalanceConfig) -> np.ndarray:
    """exp |log(correct / incorrect) - log(ratio)|. Division alone, so that 6:5 and 12:10 give the same bits."""
    ratio = correct / incorrect
    return np.maximum(ratio / options.ratio, options.ratio / ratio)


def _inside(correct: np.ndarray, incorrect: np.ndarray, low: float, high: float) -> np.ndarray:
    return (correct >= low * incorrect) & (correct <= high * incorrect)


def _class_counts(outcomes: np.ndarray, parts: np.ndarray, count: int) -> np.ndarray:
    """[3, count] int64: row 1 correct, row 0 incorrect and row -1, which is the last, unknown."""
    rows = [np.bincount(parts[outcomes == outcome], minlength=count) for outcome in (0, 1, -1)]
    return np.stack(rows).astype(np.int64)


def _report(
    outcomes: np.ndarray, group: np.ndarray, count: int, keep: np.ndarray, limit: np.ndarray, options: BalanceConfig
) -> BalanceReport:
    """``group`` [n]: index of each rollout's group; ``limit`` [3, count]: what stays of each pool and class."""
    before = _class_counts(outcomes, group, count)
    after = _class_counts(outcomes[keep], group[keep], count)
    correct, incorrect = limit[Outcome.CORRECT], limit[Outcome.INCORRECT]
    out_of_band = (correct > 0) & (incorrect > 0) & ~_inside(correct, incorrect, *ratio_band(options))
    return BalanceReport(
        correct_before=int(before[Outcome.CORRECT].sum()),
        incorrect_before=int(before[Outcome.INCORRECT].sum()),
        unknown_before=int(before[Outcome.UNKNOWN].sum()),
        correct_after=int(after[Outcome.CORRECT].sum()),
        incorrect_after=int(after[Outcome.INCORRECT].sum()),
        unknown_after=int(after[Outcome.UNKNOWN].sum()),
        groups=count,
        one_sided_groups=int(((before[Outcome.CORRECT] > 0) != (before[Outcome.INCORRECT] > 0)).sum()),
        touched_groups=int((after < before).any(axis=0).sum()),
        out_of_band=int(out_of_band.sum()),
    )
