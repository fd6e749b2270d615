"""Which tokens of a packed row a context-parallel rank has. Pure numpy.

There is one slicing, that of Transformer Engine for packed sequences: each sequence is lengthened to a multiple of
2 * R positions and cut into 2 * R equal chunks for R ranks; rank r has the chunks r and 2 * R - 1 - r of every
sequence, in this order, one sequence after the other. A late token attends to more keys than an early one: an early
and a late chunk for each rank share the work of causal attention evenly.

With R = 2 and two sequences of 4 and 8 positions, bounds [0, 4, 12]:

    position   0 1 2 3 | 4 5  6 7  8 9  10 11
    rank       0 1 1 0 | 0 0  1 1  1 1   0  0
"""

from __future__ import annotations

import numpy as np


def lengthen(
    bounds: np.ndarray, sequence_multiple: int, row_multiple: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lay a row out so that it can be cut evenly: longer sequences, and one more at the end that holds no token.

    bounds [S + 1]: where the sequences start and end, from 0 to the length of the row. Each sequence becomes a multiple
    of ``sequence_multiple``, then the row one of ``row_multiple``, which is itself a multiple of ``sequence_multiple``.
    Returns the new bounds, for each new position the old one or -1 where there was none, and its place in its sequence.
    """
    starts, lengths = bounds[:-1], np.diff(bounds)
    longer = -(-lengths // sequence_multiple) * sequence_multiple
    missing = -longer.sum() % row_multiple
    if missing:
        starts, lengths, longer = np.append(starts, 0), np.append(lengths, 0), np.append(longer, missing)
    ends = np.cumsum(longer)
    places = np.arange(ends[-1]) - np.repeat(ends - longer, longer)
    origins = np.where(places < np.repeat(lengths, longer), np.repeat(starts, longer) + places, -1)
    return np.append(0, ends), origins, places


def positions_of_rank(bounds: np.ndarray, ranks: int, rank: int) -> np.ndarray:
    """Positions [T / ranks] of a row that ``rank`` of ``ranks`` has, in the order in which it has them.

    bounds [S + 1]: where the sequences start and end; each length is a multiple of 2 * ``ranks``.
    """
    chunks = np.diff(bounds) // (2 * ranks)
    starts = (bounds[:-1, None] + chunks[:, None] * np.array([rank, 2 * ranks - 1 - rank])).ravel()
    lengths = np.repeat(chunks, 2)
    return np.repeat(starts - (np.cumsum(lengths) - lengths), lengths) + np.arange(lengths.sum())
