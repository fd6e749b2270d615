"""Lengths of responses when only their mean and the longest are known.

Of all distributions on [0, longest] with that mean, the one of largest entropy is assumed: a density that is
proportional to exp(-rate x). A mean of half the longest makes it uniform.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

SLICES = 256  # of the integrals
STEEPEST = 500.0  # rate * longest: the mean is 1/500 of the longest, or 499/500


@dataclass(frozen=True)
class Lengths:
    """Response lengths of a step."""

    mean: float
    longest: float

    @property
    def points(self) -> np.ndarray:
        """Middles of equal slices of [0, longest], [SLICES]."""
        return (np.arange(SLICES) + 0.5) * self.longest / SLICES

    def survival(self) -> np.ndarray:
        """Share of responses that are longer than each of ``points``, [SLICES]; times a slice, the sum is ``mean``."""
        return _survival_with_mean(self.mean / self.longest)

    @property
    def mean_age(self) -> float:
        """Mean tokens so far of a response that is under way, at a random moment of a long queue."""
        return self.mean_square(0) / (2 * self.mean)

    def mean_square(self, added: float) -> float:
        """Mean of (length + added)^2: integral of 2 (x + added) survival(x), and added^2."""
        width = self.longest / SLICES
        return float(added**2 + (2 * (self.points + added) * self.survival()).sum() * width)


@lru_cache
def _survival_with_mean(wanted: float) -> np.ndarray:
    """Share above each slice's middle of [0, 1] for a mean of ``wanted``; by bisection, it falls with the rate."""
    low, high = -STEEPEST, STEEPEST
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _survival(middle).mean() > wanted else (low, middle)
    raw = _survival((low + high) / 2)
    return np.minimum(1.0, raw * wanted / raw.mean())


def _survival(steepness: float) -> np.ndarray:
    """Share above each slice's middle for a density proportional to exp(-steepness x) on [0, 1]."""
    x = (np.arange(SLICES) + 0.5) / SLICES
    if abs(steepness) < 1e-6:
        return 1 - x
    return (np.exp(-steepness * x) - np.exp(-steepness)) / -np.expm1(-steepness)
