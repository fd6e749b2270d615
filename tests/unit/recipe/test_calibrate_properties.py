"""P1, P3, P4 and P6 of docs/calibration.md on random inputs, and equality with the slow formulas."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from options import changed
from test_calibrate_reference import (
    BATCHES,
    DELTAS,
    GRID,
    Batch,
    mean,
    mixed_units,
    sides,
    slow_delta,
    slow_margin,
    slow_mask,
    slow_shift,
)

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.calibrate import Calibration, calibrate

DIRECTIONS = ("lift", "drop", "spread", "balanced")
SHIFTS = st.builds(
    CalibrationConfig,
    margin=st.sampled_from(["mean", "minmax", "hinge"]),
    scope=st.sampled_from(["group", "global"]),
    direction=st.sampled_from(DIRECTIONS),
    delta=DELTAS,
    delta_unit=st.sampled_from(["absolute", "sigma"]),
    max_shift=st.sampled_from([None, None, 0.0, 0.25, 1.0]),
)
MASKS = st.builds(
    CalibrationConfig,
    method=st.sampled_from(["mask", "mask", "mask_group"]),
    margin=st.sampled_from(["mean", "minmax"]),
    delta=DELTAS,
    delta_unit=st.sampled_from(["absolute", "sigma"]),
    min_retain=st.sampled_from([0.0, 0.25, 0.29, 0.5, 1.0]),
)
CLOSE = 1e-11


def run(batch: Batch, options: CalibrationConfig) -> Calibration:
    return calibrate(batch.returns, batch.outcomes, batch.groups, options)


def after(batch: Batch, result: Calibration) -> Batch:
    """The batch with its returns shifted."""
    return Batch(batch.returns + result.offsets, batch.outcomes, batch.groups)


@given(BATCHES, SHIFTS)
@settings(max_examples=150, deadline=None)
def test_the_shift_is_that_of_the_slow_formula(batch: Batch, options: CalibrationConfig) -> None:
    result = run(batch, options)
    assert result.offsets == pytest.approx(slow_shift(batch, options), abs=CLOSE)
    assert result.keep.all() and result.offsets.dtype == np.float64


@given(BATCHES, MASKS, st.sampled_from(["group", "global"]))
@settings(max_examples=200, deadline=None)
def test_the_mask_is_that_of_the_slow_loop(batch: Batch, options: CalibrationConfig, scope: str) -> None:
    options = options if options.method == "mask_group" else changed(options, scope=scope)
    result = run(batch, options)
    assert list(result.keep) == list(slow_mask(batch, options))
    assert not result.offsets.any()


@given(BATCHES, SHIFTS)
@settings(max_examples=100, deadline=None)
def test_p1_the_margin_becomes_the_larger_of_itself_and_delta(batch: Batch, options: CalibrationConfig) -> None:
    options = changed(options, max_shift=None)
    moved = after(batch, run(batch, options))
    for old, new in zip(mixed_units(batch, options.scope), mixed_units(moved, options.scope), strict=True):
        delta, margin = slow_delta(old, options), slow_margin(old, options.margin)
        assert float(slow_margin(new, options.margin)) == pytest.approx(float(max(margin, delta)), abs=CLOSE)


@given(BATCHES, st.sampled_from(["minmax", "hinge"]), st.sampled_from(DIRECTIONS), DELTAS)
@settings(max_examples=80, deadline=None)
def test_p1_minmax_and_hinge_put_a_group_in_complete_order(
    batch: Batch, margin: str, direction: str, delta: float
) -> None:
    options = CalibrationConfig(margin=margin, direction=direction, delta=abs(delta))
    for unit in mixed_units(after(batch, run(batch, options)), "group"):
        correct, incorrect = sides(unit)
        assert all(good - bad >= Fraction(options.delta) - Fraction(CLOSE) for good, bad in product(correct, incorrect))


@given(BATCHES, DELTAS)
@settings(max_examples=80, deadline=None)
def test_p1_cantelli_bounds_the_pairs_still_inverted_under_mean(batch: Batch, delta: float) -> None:
    options = CalibrationConfig(delta=abs(delta) + 0.01)
    for unit in mixed_units(after(batch, run(batch, options)), "group"):
        correct, incorrect = sides(unit)
        inverted = mean([Fraction(good <= bad) for good, bad in product(correct, incorrect)])
        spread = sum(mean([(g - mean(side)) ** 2 for g in side]) for side in (correct, incorrect))
        gap = mean(correct) - mean(incorrect)
        assert inverted <= spread / (spread + gap**2)
        radius = max(abs(g - mean(side)) for side in (correct, incorrect) for g in side)
        assert min(correct) - max(incorrect) >= gap - 2 * radius


@given(BATCHES, DELTAS)
@settings(max_examples=60, deadline=None)
def test_p1_mean_with_a_delta_of_two_radii_puts_a_group_in_complete_order(batch: Batch, extra: float) -> None:
    units = mixed_units(batch, "group")
    radius = max((abs(g - mean(side)) for unit in units for side in sides(unit) for g in side), default=Fraction(0))
    options = CalibrationConfig(delta=2 * float(radius) + abs(extra))
    for unit in mixed_units(after(batch, run(batch, options)), "group"):
        assert slow_margin(unit, "minmax") >= -CLOSE


@given(BATCHES, st.sampled_from(["minmax", "hinge"]), DELTAS)
@settings(max_examples=60, deadline=None)
def test_p1_global_minmax_orders_every_group(batch: Batch, margin: str, delta: float) -> None:
    options = CalibrationConfig(margin=margin, scope="global", delta=abs(delta))
    for unit in mixed_units(after(batch, run(batch, options)), "group"):
        assert slow_margin(unit, "minmax") >= Fraction(options.delta) - Fraction(CLOSE)


def test_p1_global_mean_promises_a_group_nothing() -> None:
    batch = Batch(np.array([0.0, 1.0, 5.0, 0.0]), np.array([1, 0, 1, 0], np.int8), np.array([0, 0, 1, 1]))
    result = run(batch, CalibrationConfig(scope="global", delta=0.4))
    assert not result.offsets.any() and result.report.consistent_before == 0.5


@given(BATCHES, DELTAS, st.sampled_from(DIRECTIONS))
@settings(max_examples=60, deadline=None)
def test_the_hinge_moves_offenders_only(batch: Batch, delta: float, direction: str) -> None:
    hinge = run(batch, CalibrationConfig(margin="hinge", direction=direction, delta=delta))
    for unit in mixed_units(batch, "group"):
        correct, incorrect = sides(unit)
        for place, value, outcome in unit:
            others = incorrect if outcome == 1 else correct
            offends = any((value - x if outcome == 1 else x - value) < Fraction(delta) for x in others)
            assert offends or hinge.offsets[place] == 0.0
            assert hinge.offsets[place] * (2 * outcome - 1) >= 0.0


@given(BATCHES, DELTAS, st.sampled_from(["mean", "minmax", "hinge"]), st.randoms(use_true_random=False))
@settings(max_examples=80, deadline=None)
def test_p3_balanced_is_zero_sum_and_the_smallest_correction(batch: Batch, delta: float, margin: str, random) -> None:
    options = CalibrationConfig(margin=margin, direction="balanced", delta=delta)
    offsets = run(batch, options).offsets
    others = [run(batch, changed(options, direction=direction)).offsets for direction in ("lift", "drop", "spread")]
    for unit in mixed_units(batch, "group"):
        places = [place for place, _, _ in unit]
        own = offsets[places]
        assert own.sum() == pytest.approx(0.0, abs=CLOSE)
        norm = (own**2).sum()
        assert all(norm <= (other[places] ** 2).sum() + CLOSE for other in others)
        if margin == "minmax":
            continue  # smallest among the shifts that are constant on a side, which is what `others` shows
        # A random correction that reaches the same margin is not smaller.
        trial = np.array([random.uniform(-1, 1) for _ in places])
        moved = Batch(batch.returns[places] + trial, batch.outcomes[places], batch.groups[places])
        trial += run(moved, changed(options, direction=random.choice(DIRECTIONS))).offsets
        assert norm <= (trial**2).sum() + CLOSE


@given(BATCHES, SHIFTS)
@settings(max_examples=80, deadline=None)
def test_p4_offsets_are_bounded_by_the_cap_and_by_delta_plus_twice_the_clip(
    batch: Batch, options: CalibrationConfig
) -> None:
    clip, delta = 2.0, abs(options.delta)  # every return of BATCHES is in [-2, 2]
    options = changed(options, delta=delta)
    sizes = np.abs(run(batch, options).offsets)
    if options.delta_unit == "sigma":
        delta *= clip  # no standard deviation is above the clip
    assert (sizes <= delta + 2 * clip + CLOSE).all()
    assert options.max_shift is None or (sizes <= options.max_shift).all()


@given(BATCHES, DELTAS)
@settings(max_examples=60, deadline=None)
def test_p4_minmax_shifts_at_least_as_much_as_mean_and_by_the_stated_excess(batch: Batch, delta: float) -> None:
    lift = CalibrationConfig(direction="lift", delta=delta)
    by_mean, by_extremes = run(batch, lift).offsets, run(batch, changed(lift, margin="minmax")).offsets
    assert (by_extremes >= by_mean).all()
    for unit in mixed_units(batch, "group"):
        correct, incorrect = sides(unit)
        place = next(place for place, _, outcome in unit if outcome == 1)
        excess = float(mean(correct) - min(correct) + max(incorrect) - mean(incorrect))
        if by_mean[place] > 0:
            assert by_extremes[place] - by_mean[place] == pytest.approx(excess, abs=CLOSE)
        else:
            assert by_extremes[place] <= excess + CLOSE


@given(BATCHES, st.one_of(SHIFTS, MASKS), st.tuples(GRID, GRID, GRID))
@settings(max_examples=100, deadline=None)
def test_p6_a_constant_per_prompt_changes_nothing_in_group_scope(
    batch: Batch, options: CalibrationConfig, constants: tuple[float, float, float]
) -> None:
    options = changed(options, scope="group")
    names = [-7, 3, 2**62]
    added = np.array([constants[names.index(int(group))] for group in batch.groups])
    old, new = run(batch, options), run(replace(batch, returns=batch.returns + added), options)
    assert new.offsets == pytest.approx(old.offsets, abs=CLOSE)
    assert list(new.keep) == list(old.keep)


def test_p6_a_constant_per_prompt_changes_the_result_in_global_scope() -> None:
    batch = Batch(np.array([0.5, 0.0, 0.5, 0.0]), np.array([1, 0, 1, 0], np.int8), np.array([0, 0, 1, 1]))
    options = CalibrationConfig(scope="global", margin="minmax")
    assert not run(batch, options).offsets.any()
    assert run(replace(batch, returns=batch.returns + np.array([0.0, 0.0, 3.0, 3.0])), options).offsets.all()


@given(BATCHES, SHIFTS, st.sampled_from([0.25, 2.0, 8.0]))
@settings(max_examples=60, deadline=None)
def test_p6_in_units_of_sigma_the_shift_scales_with_the_returns(
    batch: Batch, options: CalibrationConfig, scale: float
) -> None:
    options = changed(options, delta_unit="sigma", max_shift=None)
    old, new = run(batch, options), run(replace(batch, returns=batch.returns * scale), options)
    assert new.offsets == pytest.approx(old.offsets * scale, abs=8 * CLOSE)


@given(BATCHES, st.one_of(SHIFTS, MASKS), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_the_order_of_the_input_does_not_matter(batch: Batch, options: CalibrationConfig, random) -> None:
    order = np.array(random.sample(range(len(batch.returns)), len(batch.returns)), dtype=np.int64)
    old, new = run(batch, options), run(batch.take(order), options)
    assert new.offsets.tobytes() == old.offsets[order].tobytes()

    def kept(source: Batch, result: Calibration) -> list[tuple]:
        rows = zip(source.groups, source.outcomes, source.returns, result.keep, strict=True)
        return sorted(tuple(map(float, row)) for row in rows)

    assert kept(batch, old) == kept(batch.take(order), new)
    if options.method == "shift" or len(set(batch.returns)) == len(batch.returns):
        assert list(new.keep) == list(old.keep[order])
        assert (new.report.kept, new.report.shifted) == (old.report.kept, old.report.shifted)


@given(BATCHES, st.one_of(SHIFTS, MASKS))
@settings(max_examples=60, deadline=None)
def test_a_group_does_not_feel_the_others(batch: Batch, options: CalibrationConfig) -> None:
    options = changed(options, scope="group")
    whole = run(batch, options)
    for name in set(batch.groups):
        own = np.flatnonzero(batch.groups == name)
        alone = run(batch.take(own), options)
        assert alone.offsets == pytest.approx(whole.offsets[own], abs=CLOSE)
        assert list(alone.keep) == list(whole.keep[own])
