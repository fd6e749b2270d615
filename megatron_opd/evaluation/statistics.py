"""What the outcomes of n responses to each of m problems say about a model, and about the difference of two.

Problems are the sample: responses to one problem are alike, so that errors and intervals are made over problems, never
over responses. The pass@k estimator is that of Chen et al. 2021 (arXiv 2107.03374), the standard error clustered by
problem and the paired comparison are those of Miller 2024 (arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000  # of a bootstrap
FLIPS = 100_000  # of a permutation test that is not enumerated
MOST_ENUMERATED = 16  # differences other than 0, of which all 2**16 signs are tried
CHUNK = 1_000  # resamples in memory at once
LEVEL = 0.95  # of every interval


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over problems."""

    value: float
    standard_error: float | None  # None of one problem
    low: float  # bootstrap interval of LEVEL
    high: float
    problems: int  # that could be counted


@dataclass(frozen=True, slots=True)
class Difference:
    """How much more often the second of two models is right, on the same problems."""

    estimate: Estimate  # of the mean difference, second minus first
    p_value: float  # two-sided, of no difference
    exact: bool  # whether all signs were enumerated
    better: int  # problems that the second solves more often
    worse: int


def pass_at(k: int, responses: int, correct: int) -> float:
    """Probability that one of k responses is right, when ``correct`` of ``responses`` >= k drawn ones are: unbiased.

    pass_at(2, responses=4, correct=1) is 0.5: of the 6 pairs out of 4 responses, 3 hold the right one.
    """
    return 1.0 - math.comb(responses - correct, k) / math.comb(responses, k)


def estimate(values: Sequence[float], seed: int) -> Estimate | None:
    """The mean of one value a problem; None of no values."""
    if not len(values):
        return None
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1) / math.sqrt(len(array))) if len(array) > 1 else None
    low, high = _bootstrap(array, seed)
    return Estimate(float(array.mean()), error, low, high, len(array))


def difference(first: Sequence[float], second: Sequence[float], seed: int) -> Difference | None:
    """Paired comparison of one value a problem, in the same order; None of no values."""
    gaps = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    mean = estimate(gaps, seed)
    if mean is None:
        return None
    p_value, exact = _permutation(gaps, seed)
    return Difference(mean, p_value, exact, int((gaps > 0).sum()), int((gaps < 0).sum()))


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Percentiles of the means of RESAMPLES draws of as many problems, with replacement."""
    size, generator = len(values), np.random.default_rng(seed)
    means = _chunks(RESAMPLES, lambda count: values[generator.integers(size, size=(count, size))].mean(axis=1))
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _permutation(gaps: np.ndarray, seed: int) -> tuple[float, bool]:
    """Share of sign changes under which the mean is as far from 0 as it is: the two models of a problem swapped."""
    moved = gaps[gaps != 0]
    observed = abs(moved.sum()) * (1 - 1e-12)  # sums in another order differ in the last bit
    exact = len(moved) <= MOST_ENUMERATED
    if exact:
        bits = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((abs((2 * bits - 1) @ moved) >= observed).mean()), exact
    generator = np.random.default_rng(seed)
    sums = _chunks(FLIPS, lambda count: (2 * generator.integers(2, size=(count, len(moved))) - 1) @ moved)
    return float(((abs(sums) >= observed).sum() + 1) / (FLIPS + 1)), exact


def _chunks(total: int, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """``total`` draws, a bounded number at a time."""
    return np.concatenate([draw(min(CHUNK, total - done)) for done in range(0, total, CHUNK)])
