"""Where each token of a multimodal row is, in time, height and width. Pure numpy.

The rotary embedding of Qwen2-VL and its successors turns a part of each head by each of three positions. Text advances
all three by 1. The tokens of an image share one time, and have their row and column in the image besides; what comes
after an image goes on behind its longer side. A sequence of 2 tokens, an image of 2 rows and 3 columns, and 2 tokens:

    time     0 1  2 2 2 2 2 2  5 6
    height   0 1  2 2 2 3 3 3  5 6
    width    0 1  2 3 4 2 3 4  5 6
"""

from __future__ import annotations

import numpy as np


def image_positions(bounds: np.ndarray, starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Positions [3, T] int64 of the tokens of a row.

    bounds [S + 1]: where its sequences start and end, from 0 to T, each counted from 0. starts [I], ascending: the
    first placeholder of each image, whose rows * columns placeholders lie within one sequence. sizes [I, 2]: rows and
    columns.
    """
    steps = np.ones(bounds[-1], np.int64)  # from the token before
    within = np.zeros((3, bounds[-1]), np.int64)  # an image's own rows and columns
    for start, (rows, columns) in zip(starts.tolist(), sizes.tolist(), strict=True):
        tokens = np.arange(rows * columns)
        inside = slice(start, start + rows * columns)
        within[1, inside], within[2, inside] = np.divmod(tokens, columns)
        steps[start + 1 : inside.stop] = 0
        if inside.stop < len(steps):
            steps[inside.stop] = max(rows, columns)
    along = np.cumsum(steps)
    lengths = np.diff(bounds)
    begins = along[np.minimum(bounds[:-1], max(len(along) - 1, 0))]
    return along - np.repeat(begins, lengths) + within
