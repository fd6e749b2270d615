"""Graded trajectories sorted by unit, outcome and return, and the margins that follow. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.records import Outcome

# Differences below this (nats per token, about 1e-12) are rounding: neither a violation, nor a gain, nor a tie-break.
TOLERANCE = 2.0**-40


@dataclass(frozen=True, slots=True, eq=False)
class Sides:
    """The graded trajectories of all mixed units, sorted by (unit, side, badness, place in the input).

    Unit: what is calibrated as one, a prompt's group or the whole batch. Mixed: it has both outcomes; a unit that is
    not mixed has no margin and is left out. Side: 0 the incorrect ones, 1 the correct ones of a unit.
    Badness: the return of an incorrect, minus the return of a correct trajectory, so that on either side the last row
    is the worst one, less is better, and a margin is minus the sum of the two sides' statistics.
    The order is a function of the values: sums over it have the same bits however the input was ordered.

    Legend: K trajectories, U mixed units.
    """

    index: np.ndarray  # [K] int64, place in the input
    badness: np.ndarray  # [K] float64, nats per token
    segment: np.ndarray  # [K] int64, 2 * unit + side
    starts: np.ndarray  # [2U] int64, first row of each segment
    counts: np.ndarray  # [2U] int64, rows of each segment, at least 1

    @property
    def position(self) -> np.ndarray:
        """Place of each row in its segment, [K], 0 = the best."""
        return np.arange(len(self.index)) - self.starts[self.segment]

    @property
    def signs(self) -> np.ndarray:
        """+1 for a correct, -1 for an incorrect trajectory, [K]: what turns badness into a return is minus this."""
        return 2.0 * (self.segment % 2) - 1.0


def arrange(returns: np.ndarray, outcomes: np.ndarray, units: np.ndarray, levels: np.ndarray) -> Sides:
    """Sort the trajectories that take part; all arguments [k].

    returns float64; outcomes, 0 or 1; units: number of each one's unit, from 0 on; levels: ``dense(returns)``.
    ``Sides.index`` counts in these k trajectories.
    """
    side = (outcomes == Outcome.CORRECT).astype(np.int64)
    sizes = np.bincount(2 * units + side, minlength=2 * (int(units.max(initial=-1)) + 1))
    mixed = (sizes.reshape(-1, 2) > 0).all(axis=1)
    index = np.flatnonzero(mixed[units])
    segment = (2 * (np.cumsum(mixed) - 1)[units] + side)[index]
    sign = (1 - 2 * side)[index]
    level = sign * levels[index] + side[index] * len(units)  # falls with the return on the correct side
    order = order_by(segment, level, len(units) + 1)
    counts = sizes.reshape(-1, 2)[mixed].ravel()
    return Sides(index[order], (sign * returns[index])[order], segment[order], np.cumsum(counts) - counts, counts)


def dense(values: np.ndarray) -> np.ndarray:
    """Rank of each value among the distinct ones, [k] int64, 0 = the smallest."""
    order = np.argsort(values)
    ranked = values[order]
    level = np.empty(len(values), dtype=np.int64)
    level[order] = np.cumsum(np.append(False, ranked[1:] != ranked[:-1])[: len(values)])
    return level


def order_by(first: np.ndarray, second: np.ndarray, bound: int) -> np.ndarray:
    """Indices that sort by ``first``, then ``second``, then place; [k] int64, 0 <= second < bound, 0 <= first."""
    size = len(first)
    if (int(first.max(initial=0)) + 1) * bound * size >= 2**63:
        return np.lexsort((second, first))
    # One unique integer key each: for those, numpy's unstable (vectorised, ten times faster) sort is stable too.
    return np.argsort((first * bound + second) * size + np.arange(size))


def running(combine: np.ufunc, values: np.ndarray, position: np.ndarray) -> np.ndarray:
    """Prefix sums (np.add), minima (np.minimum) ... that start anew at each segment; values, position [K].

    A difference of global prefix sums would let the rounding of one segment reach the next. Instead: doubling strides,
    log2(longest segment) vector operations; or one accumulation for each segment where those are fewer.
    """
    out = values.copy()
    longest = int(position.max(initial=0))
    firsts = np.flatnonzero(position == 0)
    if len(firsts) <= longest.bit_length():
        for part in np.split(out, firsts[1:]):
            combine.accumulate(part, out=part)
        return out
    stride = 1
    while stride <= longest:
        out[stride:] = np.where(position[stride:] >= stride, combine(out[stride:], out[:-stride]), out[stride:])
        stride *= 2
    return out


def worst(sides: Sides) -> np.ndarray:
    """Badness of the worst trajectory of each segment, [2U]."""
    return sides.badness[sides.starts + sides.counts - 1]


def margins(sides: Sides, badness: np.ndarray, keep: np.ndarray, margin: str) -> np.ndarray:
    """Margin of each unit, [U]: mean or (minmax, hinge) extreme of correct minus that of incorrect returns.

    badness [K]: as in ``sides`` or shifted; keep [K] bool: rows that count. nan where a side has no row left.
    """
    count = np.add.reduceat(keep.astype(np.int64), sides.starts)
    if margin == "mean":
        statistic = np.add.reduceat(np.where(keep, badness, 0.0), sides.starts) / np.maximum(count, 1)
    else:
        statistic = np.maximum.reduceat(np.where(keep, badness, -np.inf), sides.starts)
    statistic = np.where(count > 0, statistic, np.nan)
    return -(statistic[0::2] + statistic[1::2])


def deviations(sides: Sides) -> np.ndarray:
    """Population standard deviation of the returns of each unit, both outcomes pooled, [U]."""
    returns, unit = -sides.signs * sides.badness, sides.segment // 2
    starts, count = sides.starts[0::2], sides.counts[0::2] + sides.counts[1::2]
    centred = returns - (np.add.reduceat(returns, starts) / count)[unit]
    return np.sqrt(np.add.reduceat(centred**2, starts) / count)
