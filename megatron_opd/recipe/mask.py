"""Which trajectories to remove so that each unit reaches the margin. Pure numpy, no loop over removals."""

from __future__ import annotations

import numpy as np

from megatron_opd.recipe.margin import TOLERANCE, Sides, dense, margins, order_by, running


def keep_groups(sides: Sides, delta: np.ndarray, margin: str) -> np.ndarray:
    """True for the rows of units whose margin is at least ``delta`` ([U]), [K] bool.

    Source: Uni-OPD (arXiv 2605.03677), version 1, equation 10.
    """
    reached = margins(sides, sides.badness, np.ones(len(sides.index), dtype=bool), margin) >= delta - TOLERANCE
    return reached[sides.segment // 2]


def keep_greedily(sides: Sides, delta: np.ndarray, margin: str, min_retain: float) -> np.ndarray:
    """False for the rows that greedy removal takes out until the unit's margin is ``delta`` ([U]), [K] bool.

    One step removes the worst correct or the worst incorrect trajectory that is left, whichever raises the margin more.
    It ends when the margin is delta, or when neither step raises it or is allowed: a side never falls below
    max(1, floor(min_retain * n)). Ties:

    - equal gains: the side with more trajectories left gives one, with equally many the incorrect side;
    - equal worst trajectories (returns): under "mean" the one latest in the input goes first; under "minmax" removing
      one of several equal ones gains nothing, so a step removes all of them, if min_retain allows.

    Source: Uni-OPD (arXiv 2605.03677), version 2; there ties end the loop or always cost a correct trajectory.

    How it avoids the loop: the gain of a side's k-th removal does not depend on the other side, so the loop merges two
    queues, always taking the head with the higher priority (gain, trajectories left, side). Such a merge is the order
    of the lowest priority so far within a queue: an element comes out right after the lowest one before it.
    """
    statistic, priority = _priorities(sides, margin, min_retain)
    from_worst = (sides.counts[sides.segment] - 1 - sides.position)[::-1]
    lowest = running(np.minimum, priority[::-1], from_worst)[::-1]
    rows = np.flatnonzero(lowest >= 0)[::-1]  # worst first in each segment; from here on in order of removal
    unit, side = sides.segment[rows] // 2, sides.segment[rows] % 2
    highest = int(lowest.max(initial=0))
    order = order_by(unit, highest - lowest[rows], highest + 1)
    rows, unit, side = rows[order], unit[order], side[order]

    # Margin just before each removal: how many of either side the same unit has lost by then.
    fresh = np.diff(unit, prepend=-1) > 0
    left = [_left_before(side == number, fresh, sides.counts[2 * unit + number]) for number in (0, 1)]
    ends = [statistic[sides.starts[2 * unit + number] + left[number] - 1] for number in (0, 1)]
    keep = np.ones(len(sides.index), dtype=bool)
    keep[rows[-(ends[0] + ends[1]) < delta[unit] - TOLERANCE]] = False
    return keep


def _left_before(own: np.ndarray, fresh: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Trajectories of a side that are left before each removal. own: this removal is of the side; fresh: a new unit."""
    before = np.cumsum(own) - own
    return count - (before - np.maximum.accumulate(np.where(fresh, before, 0)))


def _priorities(sides: Sides, margin: str, min_retain: float) -> tuple[np.ndarray, np.ndarray]:
    """Statistic of a segment with this row as its worst, [K] float64, and the priority of removing it, [K] int64.

    A priority of -1 means that the removal is not allowed or gains nothing.
    """
    position = sides.position
    if margin == "mean":
        statistic, gain = _mean_gains(sides, position)
        turn, rest = position + 1, position
    else:
        statistic, (gain, turn, rest) = sides.badness, _extreme_gains(sides, position)
    # The small number keeps a product such as 0.29 * 100 = 28.999999999999996 from losing one.
    least = np.maximum(1, np.floor(sides.counts * min_retain + 1e-9)).astype(np.int64)
    gain = np.rint(gain / TOLERANCE)
    allowed = (rest >= least[sides.segment]) & (gain > 0)
    priority = 2 * (dense(gain) * (int(turn.max(initial=0)) + 1) + turn) + (sides.segment % 2 == 0)
    return statistic, np.where(allowed, priority, -1)


def _mean_gains(sides: Sides, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean badness of a segment's rows up to each row, and how much the mean falls when that row goes."""
    best = sides.badness[sides.starts][sides.segment]
    above = sides.badness - best  # rows equal to the best have exactly 0, so they gain exactly 0
    total = running(np.add, above, position)
    left = position + 1
    return best + total / left, (above - total / left) / np.maximum(position, 1)


def _extreme_gains(sides: Sides, position: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gain of removing the run of equal rows that a row is in, rows left before, and rows left after, each [K]."""
    fresh = (position == 0) | (np.diff(sides.badness, prepend=0.0) > TOLERANCE)
    first, run = np.flatnonzero(fresh), np.cumsum(fresh) - 1
    last = np.append(first[1:], len(position))[: len(first)] - 1
    gain = sides.badness[last] - sides.badness[np.maximum(first - 1, 0)]
    return gain[run], (position[last] + 1)[run], position[first][run]
