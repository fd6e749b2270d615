"""Edge cases, wrong input, ties, the report, and the flaws of the authors' release that concern calibration.

Numbers in names are those of the list of flaws that this project keeps from reading the release.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from options import changed
from pydantic import ValidationError
from test_calibrate_reference import Batch, batch_of

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.calibrate import Calibration, calibrate, calibrate_sharded, trajectory_return
from megatron_opd.recipe.margin import order_by

SHIFTS = [
    CalibrationConfig(method="shift", margin=margin, scope=scope, direction=direction, delta=0.5, delta_unit=unit)
    for margin, scope, direction, unit in product(
        ("mean", "minmax", "hinge"),
        ("group", "global"),
        ("lift", "drop", "spread", "balanced"),
        ("absolute", "sigma"),
    )
]
MASKS = [
    CalibrationConfig(method="mask", margin=margin, scope=scope, delta=0.5)
    for margin, scope in product(("mean", "minmax"), ("group", "global"))
]
MODES = [
    *SHIFTS,
    *MASKS,
    CalibrationConfig(method="mask_group", delta=0.5),
    CalibrationConfig(method="none", delta=0.5),
]


def run(batch: Batch, options: CalibrationConfig) -> Calibration:
    return calibrate(batch.returns, batch.outcomes, batch.groups, options)


def untouched(result: Calibration) -> bool:
    return not result.offsets.any() and bool(result.keep.all())


NAN, INF = float("nan"), float("inf")
IDLE = {
    "empty": batch_of(),
    "one": batch_of((0.1, 1, 0)),
    "one-sided": batch_of((0.1, 1, 0), (0.3, 1, 0), (0.2, 1, 1)),
    "unknown": batch_of((0.1, -1, 0), (0.3, -1, 0), (0.2, -1, 1)),
    "one side unknown": batch_of((0.1, 1, 0), (0.3, -1, 0)),
    "one side not finite": batch_of((0.1, 1, 0), (NAN, 0, 0), (INF, 0, 0), (-INF, 0, 0)),
    "nothing finite": batch_of((NAN, 1, 0), (NAN, 0, 0)),
}


@pytest.mark.parametrize("batch", IDLE.values(), ids=IDLE)
def test_nothing_to_compare_changes_nothing_in_any_mode(batch: Batch) -> None:
    for options in MODES:
        result = run(batch, options)
        assert untouched(result) and len(result.offsets) == len(result.keep) == len(batch.returns)
        assert result.report.mixed_groups == 0 and result.report.margin_after is None


def test_one_sided_groups_are_untouched_beside_a_mixed_one() -> None:
    batch = batch_of((0.0, 1, 0), (0.2, 0, 0), (-9.0, 1, 1), (9.0, 0, 2))
    for options in MODES:
        result = run(batch, options)
        assert options.scope == "global" or (not result.offsets[2:].any() and result.keep[2:].all())


def test_equal_returns_and_delta_zero_are_already_in_order() -> None:
    batch = batch_of((0.1, 1, 0), (0.1, 1, 0), (0.1, 0, 0))
    for options in MODES:
        assert untouched(run(batch, changed(options, delta=0.0)))
    # Their deviation is 0 up to rounding (0.1 is no binary fraction), so a delta in sigma is met too.
    assert untouched(run(batch, CalibrationConfig(delta=5.0, delta_unit="sigma")))
    assert run(batch, CalibrationConfig(delta=0.0)).report.consistent_before == 1.0


def test_sigma_is_the_population_deviation_of_both_outcomes_of_the_unit() -> None:
    batch = batch_of((1.0, 1, 0), (3.0, 0, 0), (0.0, 1, 1), (0.0, 0, 1), (8.0, 1, 2))
    lift = CalibrationConfig(direction="lift", delta=2.0, delta_unit="sigma")
    assert run(batch, lift).offsets == pytest.approx([2.0 + 2.0 * 1.0, 0, 0, 0, 0])
    whole = run(batch, changed(lift, scope="global"))  # one-sided groups count in the batch's sigma
    shift = 2.0 * np.std([1, 3, 0, 0, 8]) - (np.mean([1, 0, 8]) - np.mean([3, 0]))
    assert whole.offsets == pytest.approx([shift, 0, shift, 0, shift])


def test_a_huge_delta_is_reached_and_a_cap_limits_it() -> None:
    batch = batch_of((-0.3, 1, 0), (-0.1, 1, 0), (0.0, 0, 0))
    for options in SHIFTS:
        far = changed(options, delta=1e6, delta_unit="absolute")
        assert run(batch, far).report.margin_after == pytest.approx(1e6)
        assert np.abs(run(batch, changed(far, max_shift=0.7)).offsets).max() <= 0.7
        assert untouched(run(batch, changed(far, max_shift=0.0)))


def test_options_are_checked() -> None:
    for wrong in (
        {"method": "Shift"},
        {"margin": "min_max"},
        {"scope": "sample"},
        {"direction": "both"},
        {"delta_unit": None},
        {"delta": NAN},
        {"delta": "0.4"},
        {"delta": True},
        {"max_shift": -0.1},
        {"max_shift": INF},
        {"min_retain": 1.5},
        {"min_retain": -0.1},
        {"method": "mask", "margin": "hinge"},
        {"method": "mask_group", "margin": "hinge"},
        {"method": "mask_group", "scope": "global"},
    ):
        with pytest.raises(ValidationError) as error:
            CalibrationConfig(**wrong)
        assert isinstance(error.value, ValueError)
        assert all(str(value) in str(error.value) for value in wrong.values())


ONES, SIDES, NAMES = np.zeros(2), np.array([1, 0], np.int8), np.zeros(2, np.int64)


@pytest.mark.parametrize(
    ("returns", "outcomes", "groups", "match"),
    [
        (np.zeros(2, np.int64), SIDES, NAMES, r"returns: got int64 \(2,\), expected \[n\] of float"),
        (np.zeros((2, 1)), SIDES, NAMES, r"returns: got float64 \(2, 1\)"),
        ([0.0, 0.0], SIDES, NAMES, "returns: got list"),
        (ONES, np.array([True, False]), NAMES, "outcomes: got bool"),
        (ONES, np.array([1.0, 0.0]), NAMES, "outcomes: got float64"),
        (ONES, np.array([1, None]), NAMES, "outcomes: got object"),
        (ONES, np.array([1, 2], np.int8), NAMES, "outcomes: got 2, expected 1 correct, 0 incorrect or -1 unknown"),
        (ONES, np.array([-2, 0], np.int8), NAMES, "outcomes: got -2"),
        (ONES, SIDES[:1], NAMES, "outcomes: got 1, expected 2"),
        (ONES, SIDES, np.zeros(3, np.int64), "groups: got 3, expected 2"),
        (ONES, SIDES, np.zeros(2), "groups: got float64"),
        (ONES, SIDES, None, "groups: got NoneType"),
    ],
)
def test_wrong_arrays_are_errors(returns, outcomes, groups, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        calibrate(returns, outcomes, groups, CalibrationConfig())


def test_the_input_is_not_changed_and_any_float_and_integer_width_gives_the_same() -> None:
    batch = batch_of((0.25, 1, 0), (0.5, 0, 0), (-0.75, 1, 1), (0.125, 0, 1))
    for options in MODES:
        copies = [array.copy() for array in (batch.returns, batch.outcomes, batch.groups)]
        result = run(batch, options)
        assert all(np.array_equal(a, b) for a, b in zip(copies, vars(batch).values(), strict=True))
        narrow = calibrate(
            batch.returns.astype(np.float32), batch.outcomes.astype(np.int64), batch.groups.astype(np.int32), options
        )
        assert narrow.offsets.tobytes() == result.offsets.tobytes() and list(narrow.keep) == list(result.keep)


def test_the_report_of_a_shift_and_of_a_mask() -> None:
    batch = batch_of((0.0, 1, 0), (0.5, 0, 0), (1.0, 1, 1), (0.0, 0, 1), (0.0, 1, 2), (NAN, 0, 1), (0.0, -1, 3))
    shift = run(batch, CalibrationConfig(delta=0.5)).report
    assert (shift.trajectories, shift.graded, shift.groups, shift.mixed_groups) == (7, 5, 4, 2)
    assert (shift.consistent_before, shift.margin_before, shift.margin_after) == (0.5, 0.25, 0.75)
    assert (shift.changed_groups, shift.shifted, shift.mean_shift, shift.max_shift, shift.kept) == (
        0.5,
        0.4,
        0.2,
        0.5,
        1.0,
    )
    mask = run(batch, CalibrationConfig(method="mask_group", delta=0.5)).report
    assert (mask.margin_before, mask.margin_after, mask.changed_groups, mask.kept) == (0.25, 1.0, 0.5, 0.6)


def test_the_mask_keeps_the_stated_share_of_either_side() -> None:
    rows = [(float(i), 1, 0) for i in range(100)] + [(float(-i), 0, 0) for i in range(7)]
    for share, correct, incorrect in ((0.25, 25, 1), (0.29, 29, 2), (0.0, 1, 1), (1.0, 100, 7)):
        keep = run(batch_of(*rows), CalibrationConfig(method="mask", delta=1e9, min_retain=share)).keep
        assert (keep[:100].sum(), keep[100:].sum()) == (correct, incorrect)
        assert keep[100 - correct : 100].all()  # the best ones


def test_sorting_falls_back_when_the_combined_key_would_overflow() -> None:
    first, second = np.array([1, 0, 1, 0]), np.array([2**61, 5, 3, 5])
    assert list(order_by(first, second, 2**62)) == [1, 3, 2, 0] == list(order_by(first, np.minimum(second, 6), 7))


# Flaws of the authors' release. 5 to 7 and 18 to 21 are about options, labels and metrics, 12 to 17 about bad numbers.


def test_flaw_05_every_option_is_used_under_the_name_it_has() -> None:
    with pytest.raises(ValidationError, match="filter_rollout"):
        CalibrationConfig(filter_rollout=True)
    rng = np.random.default_rng(0)
    batch = Batch(rng.normal(size=30), rng.integers(0, 2, 30).astype(np.int8), rng.integers(0, 3, 30))
    seen = {(run(batch, options).offsets.tobytes(), run(batch, options).keep.tobytes()) for options in MODES}
    assert len(seen) == len(MODES)


def test_flaw_06_an_unknown_name_is_an_error_and_one_process_obeys_the_direction() -> None:
    with pytest.raises(ValueError, match="direction"):
        CalibrationConfig(direction="correct_up")
    batch = batch_of((0.0, 1, 0), (0.5, 0, 0))
    signs = {d: np.sign(run(batch, CalibrationConfig(direction=d)).offsets).tolist() for d in ("lift", "drop")}
    assert signs == {"lift": [1.0, 0.0], "drop": [0.0, -1.0]}


def test_flaw_07_missing_group_numbers_are_an_error_not_a_switch_to_global() -> None:
    with pytest.raises(ValueError, match="groups"):
        calibrate(ONES, SIDES, None, CalibrationConfig())


def test_flaw_08_labels_are_integers_and_unknown_is_not_incorrect() -> None:
    for labels in (np.array([True, False]), np.array([1.0, 0.0]), np.array([True, None])):
        with pytest.raises(ValueError, match="outcomes"):
            calibrate(ONES, labels, NAMES, CalibrationConfig())
    batch = batch_of((0.0, 1, 0), (0.5, -1, 0), (0.1, 0, 0))
    assert run(batch, CalibrationConfig(direction="lift")).offsets == pytest.approx([0.1, 0.0, 0.0])


def test_flaw_12_lengths_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="expected 2"):
        calibrate(ONES, SIDES[:1], NAMES[:1], CalibrationConfig())
    with pytest.raises(ValueError, match="equal shapes"):
        trajectory_return(np.zeros(3), np.ones(2, dtype=bool))


def test_flaw_13_and_17_a_failed_sample_is_nan_takes_no_part_and_gets_no_shift() -> None:
    batch = batch_of((-0.3, 1, 0), (-0.2, 0, 0))
    failed = batch_of((-0.3, 1, 0), (-0.2, 0, 0), (NAN, 0, 0), (NAN, 1, 0))
    for options in MODES:
        alone, beside = run(batch, options), run(failed, options)
        assert beside.offsets.tolist() == [*alone.offsets, 0.0, 0.0]
        assert beside.keep.tolist() == [*alone.keep, True, True]
    assert beside.report.graded == 2 and beside.report.trajectories == 4
    assert run(batch_of((-100.0, 1, 0), (-0.2, 0, 0)), CalibrationConfig(direction="drop")).offsets[1] < -99


def test_flaw_14_one_non_finite_trajectory_does_not_poison_its_group() -> None:
    for bad in (NAN, INF, -INF):
        result = run(batch_of((0.0, 1, 0), (0.5, 0, 0), (bad, 0, 0)), CalibrationConfig(direction="lift"))
        assert result.offsets.tolist() == [0.5, 0.0, 0.0]
    assert np.isnan(trajectory_return(np.empty(0), np.empty(0, dtype=bool)))
    assert trajectory_return(np.array([NAN, -INF, 0.5]), np.array([False, False, True])) == 0.5


def test_flaw_15_a_token_that_the_gap_mask_removes_does_not_enter_the_return() -> None:
    gaps = np.append(np.full(99, 0.1, np.float32), np.float32(-30.0))
    assert trajectory_return(gaps, np.abs(gaps) < 10) == pytest.approx(0.1)
    assert np.isnan(trajectory_return(gaps, np.zeros(100, dtype=bool)))


def test_flaw_18_a_rank_gets_its_own_slice() -> None:
    batch = batch_of((0.0, 1, 0), (0.5, 0, 0), (0.2, 1, 1), (0.4, 0, 1))
    rows = np.stack([batch.returns, batch.outcomes, batch.groups], axis=1).astype(np.float64)
    own = batch.take(np.array([2, 3]))
    part = calibrate_sharded(own.returns, own.outcomes, own.groups, CalibrationConfig(), lambda local: (rows, 2))
    assert part.offsets.tolist() == run(batch, CalibrationConfig()).offsets[2:].tolist()


def test_flaw_19_the_report_tells_the_state_before_the_shift() -> None:
    report = run(batch_of((0.0, 1, 0), (0.5, 0, 0)), CalibrationConfig(margin="minmax")).report
    assert (report.consistent_before, report.margin_before, report.margin_after) == (0.0, -0.5, 0.0)


def test_flaw_20_ties_neither_end_the_mask_early_nor_always_cost_the_correct_one() -> None:
    # Removing one of two equal worst ones gains nothing under minmax: both go.
    tied = batch_of(*[(g, 1, 0) for g in (0.0, 0.0, 1.0, 1.0)], *[(g, 0, 0) for g in (0.5, 0.0, 0.0, 0.0)])
    keep = run(tied, CalibrationConfig(method="mask", margin="minmax", delta=1.0)).keep
    assert keep.tolist() == [False, False, True, True, False, True, True, True]
    # Equal gains, equal numbers: an incorrect one first, then the side with more left, in turn.
    even = batch_of(*[(g, 1, 0) for g in (0.0, 1.0, 2.0, 3.0)], *[(g, 0, 0) for g in (3.0, 2.0, 1.0, 0.0)])
    lost = [run(even, CalibrationConfig(method="mask", delta=delta)).keep for delta in (0.1, 0.6, 1.1, 1.6)]
    assert [((~keep[:4]).sum(), (~keep[4:]).sum()) for keep in lost] == [(0, 1), (1, 1), (1, 2), (2, 2)]
    # Equal trajectories: the later one goes.
    same = batch_of((0.0, 1, 0), (0.0, 1, 0), (1.0, 1, 0), (0.0, 0, 0))
    assert run(same, CalibrationConfig(method="mask", delta=0.5)).keep.tolist() == [True, False, True, True]


def test_flaw_20_group_numbers_are_not_rounded() -> None:
    big = 2**53
    batch = batch_of((0.0, 1, big), (0.5, 0, big + 1), (0.3, 0, big + 2))
    assert untouched(run(batch, CalibrationConfig(delta=9.0)))
    with pytest.raises(ValueError, match=r"groups: got 9007199254740992.*below 2\*\*53"):
        calibrate_sharded(batch.returns, batch.outcomes, batch.groups, CalibrationConfig(), lambda local: (local, 0))


def test_flaw_21_one_rank_and_many_use_one_path_and_a_wrong_gather_is_an_error() -> None:
    batch = batch_of((0.1, 1, 0), (0.5, 0, 0))
    args = (batch.returns, batch.outcomes, batch.groups, CalibrationConfig(delta=0.3))
    assert calibrate_sharded(*args, lambda local: (local, 0)).offsets.tolist() == calibrate(*args).offsets.tolist()
    for wrong in (
        lambda local: (local.astype(np.float32), 0),
        lambda local: (local, 1),
        lambda local: (local[::-1], 0),
    ):
        with pytest.raises(ValueError, match="gather"):
            calibrate_sharded(*args, wrong)
