"""How much of a response repeats itself. Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view


def repetition(token_ids: np.ndarray, n: int) -> float:
    """Share of a response's n-grams that already occurred earlier in it: 1 - distinct / total, 0 <= share < 1.

    ``token_ids`` [R] integer. 0.0 with fewer than n tokens. A loop of period c tends to 1 as it goes on, since at most
    c of its n-grams are new. Raises ValueError for n < 1. Exact. Cost: a sort of the tokens and one of the n-grams; of
    n columns at once where an n-gram of the response's own tokens does not fit into 64 bits.
    """
    if n < 1:
        raise ValueError(f"got n = {n}, expected n >= 1")
    if len(token_ids) < n:
        return 0.0
    known, ranks = np.unique(token_ids, return_inverse=True)
    grams = sliding_window_view(ranks, n).T  # [n, total]
    bits = max(1, int(len(known) - 1).bit_length())
    if n * bits <= 64:
        shifts = np.arange(n, dtype=np.uint64)[:, None] * np.uint64(bits)
        ordered = np.sort(np.bitwise_or.reduce(grams.astype(np.uint64) << shifts, axis=0))[None]
    else:
        ordered = grams[:, np.lexsort(grams)]
    distinct = 1 + int((ordered[:, 1:] != ordered[:, :-1]).any(axis=0).sum())
    return 1.0 - distinct / grams.shape[1]
