"""Slow formulas for calibration, written with loops and exact fractions from the definitions, and random inputs.

Independent of the package: the other tests of calibration compare with these.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from hypothesis import strategies as st

from megatron_opd.config import CalibrationConfig

Group = list[tuple[int, Fraction, int]]  # (place in the input, return, outcome)


@dataclass(frozen=True)
class Batch:
    """Input of ``calibrate``."""

    returns: np.ndarray
    outcomes: np.ndarray
    groups: np.ndarray

    def take(self, order: np.ndarray) -> Batch:
        """The same trajectories, or some of them, in another order."""
        return Batch(self.returns[order], self.outcomes[order], self.groups[order])


def batch_of(*rows: tuple[float, int, int]) -> Batch:
    """A batch from rows (return, outcome, group)."""
    returns, outcomes, groups = zip(*rows, strict=True) if rows else ((), (), ())
    return Batch(np.array(returns, np.float64), np.array(outcomes, np.int8), np.array(groups, np.int64))


# Multiples of 1/16 make many ties; the others make almost none, and none nearer than the tolerance.
GRID = st.integers(-24, 24).map(lambda k: k / 16)
VALUES = st.one_of(GRID, GRID, st.integers(-(2**31), 2**31).map(lambda k: k / 2**30))
BATCHES = st.lists(
    st.tuples(VALUES, st.sampled_from([1, 0, 1, 0, 1, 0, -1]), st.sampled_from([-7, 3, 2**62])), max_size=24
)
BATCHES = BATCHES.map(lambda rows: batch_of(*rows))
DELTAS = st.one_of(GRID, st.integers(0, 3 * 2**30).map(lambda k: k / 2**30))


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction(0)) / len(values)


def sides(group: Group) -> tuple[list[Fraction], list[Fraction]]:
    """Returns of the correct and of the incorrect trajectories."""
    return [g for _, g, o in group if o == 1], [g for _, g, o in group if o == 0]


def slow_margin(group: Group, margin: str) -> Fraction:
    correct, incorrect = sides(group)
    if margin == "mean":
        return mean(correct) - mean(incorrect)
    return min(correct) - max(incorrect)


def mixed_units(batch: Batch, scope: str) -> list[Group]:
    """Units with both outcomes, graded trajectories only."""
    units: dict[int, Group] = {}
    for place in range(len(batch.returns)):
        value, outcome = float(batch.returns[place]), int(batch.outcomes[place])
        if outcome != -1 and np.isfinite(value):
            name = 0 if scope == "global" else int(batch.groups[place])
            units.setdefault(name, []).append((place, Fraction(value), outcome))
    return [unit for unit in units.values() if {o for _, _, o in unit} == {0, 1}]


def slow_delta(unit: Group, options: CalibrationConfig) -> Fraction:
    if options.delta_unit == "absolute":
        return Fraction(options.delta)
    values = [g for _, g, _ in unit]
    centre = mean(values)
    return Fraction(options.delta) * Fraction(float(mean([(g - centre) ** 2 for g in values])) ** 0.5)


def slow_shift(batch: Batch, options: CalibrationConfig) -> np.ndarray:
    """Offsets of method "shift", one trajectory at a time."""
    offsets = np.zeros(len(batch.returns))
    for unit in mixed_units(batch, options.scope):
        delta = slow_delta(unit, options)
        correct, incorrect = sides(unit)
        shift = max(Fraction(0), delta - slow_margin(unit, options.margin))
        up = {
            "lift": Fraction(1),
            "drop": Fraction(0),
            "spread": Fraction(1, 2),
            "balanced": Fraction(len(incorrect), len(unit)),
        }[options.direction]
        floor, ceiling = hinge_bounds(correct, incorrect, shift, up, options.direction)
        for place, value, outcome in unit:
            if options.margin == "hinge":
                move = max(Fraction(0), floor - value) if outcome == 1 else -max(Fraction(0), value - ceiling)
            else:
                move = up * shift if outcome == 1 else -(1 - up) * shift
            if options.max_shift is not None:
                cap = Fraction(options.max_shift)
                if options.margin != "hinge":
                    move = move / shift * min(shift, cap) if shift else move
                move = max(-cap, min(cap, move))
            offsets[place] = float(move)
    return offsets


def hinge_bounds(
    correct: list[Fraction], incorrect: list[Fraction], shift: Fraction, up: Fraction, direction: str
) -> tuple[Fraction, Fraction]:
    """Least return of a correct, largest of an incorrect trajectory after the hinge."""
    if direction != "balanced":
        return min(correct) + up * shift, max(incorrect) - (1 - up) * shift
    low, high = Fraction(0), shift  # bisection of the depth on the correct side until both sides move by the same
    for _ in range(70):
        depth = (low + high) / 2
        ups = sum((max(Fraction(0), min(correct) + depth - g) for g in correct), Fraction(0))
        downs = sum((max(Fraction(0), g - max(incorrect) + shift - depth) for g in incorrect), Fraction(0))
        low, high = (depth, high) if ups < downs else (low, depth)
    return min(correct) + low, max(incorrect) - (shift - low)


def slow_mask(batch: Batch, options: CalibrationConfig) -> np.ndarray:
    """Keep mask of both mask methods, one removal at a time."""
    keep = np.ones(len(batch.returns), dtype=bool)
    for unit in mixed_units(batch, options.scope):
        delta = slow_delta(unit, options) - Fraction(1, 2**40)
        if options.method == "mask_group":
            keep[[place for place, _, _ in unit]] = slow_margin(unit, options.margin) >= delta
            continue
        least = [max(1, int(Fraction(str(options.min_retain)) * len(side))) for side in sides(unit)]
        left = unit
        while slow_margin(left, options.margin) < delta:
            best = None
            for outcome in (1, 0):
                gone = slow_step(left, outcome, options.margin)
                rest = [row for row in left if row not in gone]
                count = sum(o == outcome for _, _, o in left)
                if count - len(gone) < least[1 - outcome]:
                    continue
                gain = slow_margin(rest, options.margin) - slow_margin(left, options.margin)
                if gain > Fraction(1, 2**41) and (best is None or (gain, count, outcome == 0) > best[0]):
                    best = ((gain, count, outcome == 0), rest)
            if best is None:
                break
            left = best[1]
        kept = {place for place, _, _ in left}
        keep[[place for place, _, _ in unit if place not in kept]] = False
    return keep


def slow_step(left: Group, outcome: int, margin: str) -> Group:
    """What one step removes from a side: its worst trajectory, the later of equal ones; under minmax all equal ones."""
    own = [row for row in left if row[2] == outcome]
    worst = max(-g if outcome == 1 else g for _, g, _ in own)
    ties = [row for row in own if (-row[1] if outcome == 1 else row[1]) == worst]
    return ties if margin == "minmax" else ties[-1:]


def test_the_slow_shift_against_numbers_worked_by_hand() -> None:
    batch = batch_of((-0.5, 1, 0), (0.0, 1, 0), (0.25, 0, 0))
    assert list(slow_shift(batch, CalibrationConfig(delta=0.5))) == [0.5, 0.5, -0.5]
    assert list(slow_shift(batch, CalibrationConfig(delta=0.5, direction="balanced"))) == [1 / 3, 1 / 3, -2 / 3]
    lift = CalibrationConfig(margin="hinge", direction="lift")
    assert list(slow_shift(batch, lift)) == [0.75, 0.25, 0.0]
    balanced = CalibrationConfig(margin="hinge", direction="balanced")
    # Meeting at c: (c + 0.5) + (c - 0) = 0.25 - c gives c = -1/12, where the second one needs no move: 2c = -0.25.
    assert list(slow_shift(batch, balanced)) == [0.375, 0.0, -0.375]


def test_the_slow_mask_against_numbers_worked_by_hand() -> None:
    # Margin 0.5 - 0.5 = 0. Dropping the correct 0 gains 0.25, the incorrect 1 gains 0.5: then the margin is 0.5.
    batch = batch_of((0.0, 1, 0), (0.5, 1, 0), (1.0, 1, 0), (1.0, 0, 0), (0.0, 0, 0))
    assert list(slow_mask(batch, CalibrationConfig(method="mask", delta=0.25))) == [True, True, True, False, True]
    assert list(slow_mask(batch, CalibrationConfig(method="mask", delta=0.75))) == [False, True, True, False, True]
