"""Outcome rewards against loops over groups, and against calibration where its weight is constant."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.config import CalibrationConfig
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.calibrate import calibrate
from megatron_opd.recipe.outcome import constant_rewards, group_advantages, placebo_outcomes, sign_agrees

DIRECTIONS = ("lift", "drop", "spread", "balanced")
labels = st.lists(st.tuples(st.sampled_from([1, 0, -1]), st.integers(-3, 4)), max_size=50)


def arrays(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    outcomes = np.array([outcome for outcome, _ in rows], dtype=np.int8)
    return outcomes, np.array([group for _, group in rows], dtype=np.int64)


def slow_terms(rows: list[tuple[int, int]], term) -> list[float]:
    """``term(R, pass rate)`` of each graded rollout of a mixed group, 0 elsewhere; one rollout after the other."""
    found = []
    for outcome, group in rows:
        graded = [other for other, own in rows if own == group and other != -1]
        mixed = 1 in graded and 0 in graded
        found.append(term(outcome, sum(graded) / len(graded)) if mixed and outcome != -1 else 0.0)
    return found


# Group advantages


@settings(deadline=None)
@given(labels, st.booleans())
def test_advantages_match_the_loop(rows, scale) -> None:
    found = group_advantages(*arrays(rows), scale_by_deviation=scale)
    assert found.dtype == np.float64 and found.shape == (len(rows),)
    expected = slow_terms(rows, lambda R, p: (R - p) / (math.sqrt(p * (1 - p)) if scale else 1.0))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(deadline=None)
@given(labels)
def test_scaled_advantages_have_mean_0_and_deviation_1_in_each_mixed_group(rows) -> None:
    outcomes, groups = arrays(rows)
    advantages = group_advantages(outcomes, groups, scale_by_deviation=True)
    for group in set(groups.tolist()):
        own = advantages[(groups == group) & (outcomes != -1)]
        if len(own) and own.any():
            assert own.mean() == pytest.approx(0, abs=1e-12) and own.std() == pytest.approx(1)


@pytest.mark.parametrize("scale", [True, False])
def test_correct_is_up_and_incorrect_is_down_by_hand(scale: bool) -> None:
    outcomes, groups = np.array([1, 0, 0, 0, -1]), np.zeros(5, np.int64)
    deviation = math.sqrt(3) / 4 if scale else 1.0
    found = group_advantages(outcomes, groups, scale_by_deviation=scale)
    assert found == pytest.approx(np.array([0.75, -0.25, -0.25, -0.25, 0.0]) / deviation)


def test_groups_that_agree_teach_nothing() -> None:
    outcomes, groups = np.array([1, 1, 0, 0, 1, -1, 0, -1, -1]), np.array([0, 0, 1, 1, 2, 2, 3, 3, 4])
    for scale in (True, False):
        assert not group_advantages(outcomes, groups, scale_by_deviation=scale).any()
    for direction in DIRECTIONS:
        assert not constant_rewards(outcomes, groups, reward=1.0, direction=direction).any()


# Constant rewards


@settings(deadline=None)
@given(labels, st.sampled_from(DIRECTIONS), st.floats(-2, 2))
def test_rewards_match_the_loop(rows, direction, reward) -> None:
    found = constant_rewards(*arrays(rows), reward=reward, direction=direction)
    assert found.dtype == np.float64 and found.shape == (len(rows),)
    baselines = {"lift": lambda p: 0, "drop": lambda p: 1, "spread": lambda p: 0.5, "balanced": lambda p: p}
    expected = slow_terms(rows, lambda R, p: reward * (R - baselines[direction](p)))
    np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(deadline=None)
@given(labels, st.sampled_from(DIRECTIONS), st.floats(0.1, 2.0), st.sampled_from(["mean", "minmax"]))
def test_p2_calibration_with_a_constant_weight_is_a_constant_reward(rows, direction, delta, margin) -> None:
    """A teacher without an opinion has margin 0 in every group, hence s(q) = delta."""
    outcomes, groups = arrays(rows)
    options = CalibrationConfig(method="shift", delta=delta, direction=direction, margin=margin, max_shift=None)
    offsets = calibrate(np.full(len(rows), -0.3), outcomes, groups, options).offsets
    rewards = constant_rewards(outcomes, groups, reward=delta, direction=direction)
    np.testing.assert_allclose(rewards, offsets, atol=1e-12)


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        ("lift", [0.4, 0.0, 0.0, 0.0]),
        ("drop", [0.0, -0.4, -0.4, 0.0]),
        ("spread", [0.2, -0.2, -0.2, 0.0]),
        ("balanced", [0.8 / 3, -0.4 / 3, -0.4 / 3, 0.0]),
    ],
)
def test_directions_by_hand(direction: str, expected: list[float]) -> None:
    found = constant_rewards(np.array([1, 0, 0, -1]), np.zeros(4, np.int64), reward=0.4, direction=direction)
    assert found == pytest.approx(expected)


def test_an_unknown_direction_lists_the_names() -> None:
    with pytest.raises(ConfigError) as caught:
        constant_rewards(np.array([1]), np.array([0]), reward=1.0, direction="up")
    assert caught.value.got == "up" and all(name in str(caught.value) for name in DIRECTIONS)


# Placebo


@settings(deadline=None)
@given(labels, st.integers(-(2**40), 2**40), st.integers(0, 9))
def test_the_placebo_keeps_the_counts_of_each_group_and_the_unknown_ones(rows, seed, step) -> None:
    outcomes, groups = arrays(rows)
    before = outcomes.copy()
    placebo = placebo_outcomes(outcomes, groups, seed=seed, step=step)
    assert placebo.dtype == outcomes.dtype and np.array_equal(outcomes, before)
    assert np.array_equal(placebo == -1, outcomes == -1)
    count = Counter(zip(groups.tolist(), outcomes.tolist(), strict=True))
    assert Counter(zip(groups.tolist(), placebo.tolist(), strict=True)) == count
    assert np.array_equal(placebo, placebo_outcomes(outcomes, groups, seed=seed, step=step))


@settings(deadline=None)
@given(labels, st.randoms(use_true_random=False))
def test_a_group_is_drawn_alone(rows, random) -> None:
    """Other groups, and how groups are interleaved, change nothing."""
    outcomes, groups = arrays(rows)
    placebo = placebo_outcomes(outcomes, groups, seed=3, step=4)
    ids = sorted(set(groups.tolist()))
    random.shuffle(ids)
    for group in ids:
        own = groups == group
        assert placebo[own].tolist() == placebo_outcomes(outcomes[own], groups[own], seed=3, step=4).tolist()
    order = np.array([i for group in ids for i in np.flatnonzero(groups == group)], dtype=np.int64)
    assert placebo_outcomes(outcomes[order], groups[order], seed=3, step=4).tolist() == placebo[order].tolist()


def test_seed_and_step_decide() -> None:
    outcomes, groups = np.tile(np.array([1] * 8 + [0] * 8, np.int8), 32), np.repeat(np.arange(32), 16)
    draws = {
        placebo_outcomes(outcomes, groups, seed=seed, step=step).tobytes() for seed in (0, 1) for step in (0, 1, 2)
    }
    assert len(draws) == 6
    rows = placebo_outcomes(outcomes, groups, seed=0, step=0).reshape(32, 16)
    assert len({row.tobytes() for row in rows}) > 16  # groups that look alike are drawn differently


def test_all_arrangements_are_equally_likely() -> None:
    count = 6000
    outcomes = np.tile(np.array([1, 1, -1, 0, 0], np.int8), count)
    placebo = placebo_outcomes(outcomes, np.repeat(np.arange(count), 5), seed=0, step=0).reshape(count, 5)
    found = Counter(map(tuple, np.delete(placebo, 2, axis=1).tolist()))
    deviation = math.sqrt(count * 1 / 6 * 5 / 6)
    assert len(found) == 6 and all(abs(number - count / 6) < 5 * deviation for number in found.values())


# Signs


@pytest.mark.parametrize(
    ("value", "outcome", "expected"),
    [
        (0.2, 1, True),
        (-0.2, 1, False),
        (0.2, 0, False),
        (-0.2, 0, True),
        (0.0, 1, True),
        (0.0, 0, True),
        (-0.0, 1, True),
        (0.2, -1, True),
        (-0.2, -1, True),
        *[(bad, outcome, True) for bad in (math.nan, math.inf, -math.inf) for outcome in (1, 0, -1)],
    ],
)
def test_signs_by_hand(value: float, outcome: int, expected: bool) -> None:
    assert sign_agrees(np.array([value]), np.array([outcome])).tolist() == [expected]


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 1), st.sampled_from([1, 0])), max_size=30))
def test_signs_match_the_formula(rows) -> None:
    returns, outcomes = np.array([g for g, _ in rows], np.float64), np.array([r for _, r in rows], np.int8)
    found = sign_agrees(returns, outcomes)
    assert found.dtype == bool and found.tolist() == [(2 * r - 1) * g >= 0 for g, r in rows]


# Empty and bad input


def test_nothing_gives_nothing() -> None:
    outcomes, groups = np.empty(0, np.int8), np.empty(0, np.int64)
    assert group_advantages(outcomes, groups, scale_by_deviation=True).shape == (0,)
    assert constant_rewards(outcomes, groups, reward=1.0, direction="balanced").shape == (0,)
    assert placebo_outcomes(outcomes, groups, seed=0, step=0).shape == (0,)
    assert sign_agrees(np.empty(0), outcomes).shape == (0,)


@pytest.mark.parametrize("outcomes", [np.array([True]), np.array([1.0]), np.array([2]), np.array([1, 0])])
def test_bad_labels_are_refused(outcomes: np.ndarray) -> None:
    groups = np.array([0])
    with pytest.raises(DataError):
        group_advantages(outcomes, groups, scale_by_deviation=False)
    with pytest.raises(DataError):
        constant_rewards(outcomes, groups, reward=1.0, direction="lift")
    with pytest.raises(DataError):
        placebo_outcomes(outcomes, groups, seed=0, step=0)
    with pytest.raises(DataError):
        sign_agrees(np.array([0.1]), outcomes)


@pytest.mark.parametrize("returns", [[0.1], np.array([1]), np.array([0.1, 0.2])])
def test_bad_returns_are_refused(returns: object) -> None:
    with pytest.raises(DataError, match="returns"):
        sign_agrees(returns, np.array([1]))  # type: ignore[arg-type]
