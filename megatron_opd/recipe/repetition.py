"""How much of a response repeats itself. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def repetition(token_ids: np.ndarray, n: int) -> float:
    """Share of a response's n-grams that already occurred earlier in it: 1 - distinct / total, 0 <= share < 1.

    ``token_ids`` [R] integer. 0.0 with fewer than n tokens. A loop of period c tends to 1 as it goes on, since at most
    c of its n-grams are new. Raises ValueError for n < 1. Cost: one exact sort of the n-grams, O(n R log R) time and
    O(n R) memory.
    """
    if n < 1:
        raise ValueError(f"got n = {n}, expected n >= 1")
    if len(token_ids) < n:
        return 0.0
    grams = sliding_window_view(token_ids, n).T  # [n, total]
    ordered = grams[:, np.lexsort(grams)]
    distinct = 1 + int((ordered[:, 1:] != ordered[:, :-1]).any(axis=0).sum())
    return 1.0 - distinct / grams.shape[1]
