"""Order consistency against loops over all pairs, exact chance levels, and invariances."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.errors import DataError
from megatron_opd.recipe.order import OrderReport, order_by_label, order_report

# Few distinct values, so that ties are common; sums of them are exact.
values = st.sampled_from([-1.5, -1.0, -0.5, 0.0, 0.25, math.nan, math.inf, -math.inf])
rows = st.lists(st.tuples(values, st.sampled_from([1, 0, -1]), st.integers(-2, 3)), max_size=40)


def arrays(drawn: list[tuple[float, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    returns = np.array([row[0] for row in drawn], dtype=np.float32)
    outcomes = np.array([row[1] for row in drawn], dtype=np.int8)
    return returns, outcomes, np.array([row[2] for row in drawn], dtype=np.int64)


def slow_report(drawn: list[tuple[float, int, int]]) -> OrderReport:
    usable = [row for row in drawn if math.isfinite(row[0]) and row[1] != -1]
    groups = sorted({group for _, _, group in usable})
    wins, pairs, consistent, gaps = 0.0, 0, [], []
    for group in groups:
        right = [value for value, outcome, own in usable if own == group and outcome == 1]
        wrong = [value for value, outcome, own in usable if own == group and outcome == 0]
        if not right or not wrong:
            continue
        for better, worse in itertools.product(right, wrong):
            wins += 1.0 if better > worse else 0.5 if better == worse else 0.0
        pairs += len(right) * len(wrong)
        consistent.append(all(better >= worse for better, worse in itertools.product(right, wrong)))
        gaps.append(sum(right) / len(right) - sum(wrong) / len(wrong))
    return OrderReport(
        auc=wins / pairs if pairs else None,
        consistency=sum(consistent) / len(consistent) if pairs else None,
        mean_gap=sum(gaps) / len(gaps) if pairs else None,
        mixed_share=len(gaps) / len(groups) if groups else None,
        groups=len(groups),
        mixed_groups=len(gaps),
        pairs=pairs,
        used=len(usable),
        excluded=len(drawn) - len(usable),
    )


def assert_equal(fast: OrderReport, slow: OrderReport) -> None:
    for name in OrderReport.__dataclass_fields__:
        assert getattr(fast, name) == pytest.approx(getattr(slow, name), abs=1e-12), name


@settings(deadline=None)
@given(rows)
def test_the_report_matches_loops_over_all_pairs(drawn) -> None:
    assert_equal(order_report(*arrays(drawn)), slow_report(drawn))


@settings(deadline=None)
@given(rows, st.lists(st.sampled_from(["code", "math"]), min_size=6, max_size=6))
def test_each_label_is_the_report_of_its_own_rollouts(drawn, label_of_group) -> None:
    labels = np.array([label_of_group[group + 2] for _, _, group in drawn], dtype=np.str_)
    reports = order_by_label(*arrays(drawn), labels)
    assert list(reports) == sorted(set(labels.tolist()))
    for label, report in reports.items():
        own = [row for row in drawn if label_of_group[row[2] + 2] == label]
        assert_equal(report, slow_report(own))


@given(rows, st.randoms(use_true_random=False))
def test_the_order_of_the_rollouts_does_not_matter(drawn, random) -> None:
    moved = drawn.copy()
    random.shuffle(moved)
    assert_equal(order_report(*arrays(moved)), order_report(*arrays(drawn)))


@given(rows, st.lists(st.integers(-8, 8), min_size=6, max_size=6))
def test_a_constant_per_group_changes_nothing(drawn, constants) -> None:
    moved = [(value + constants[group + 2], outcome, group) for value, outcome, group in drawn]
    assert_equal(order_report(*arrays(moved)), order_report(*arrays(drawn)))


@given(rows)
def test_exchanging_the_classes_reflects_auc_and_gap(drawn) -> None:
    mirrored = [(value, {1: 0, 0: 1, -1: -1}[outcome], group) for value, outcome, group in drawn]
    plain, swapped = order_report(*arrays(drawn)), order_report(*arrays(mirrored))
    assert plain.pairs == swapped.pairs
    if plain.auc is not None:
        assert swapped.auc == pytest.approx(1 - plain.auc) and swapped.mean_gap == pytest.approx(-plain.mean_gap)


@given(rows)
def test_increasing_maps_keep_auc_and_consistency(drawn) -> None:
    mapped = [(math.exp(value) if math.isfinite(value) else value, *rest) for value, *rest in drawn]
    plain, changed = order_report(*arrays(drawn)), order_report(*arrays(mapped))
    assert (plain.auc, plain.consistency) == (changed.auc, changed.consistency)


def test_ties_count_half_and_are_consistent() -> None:
    report = order_report(np.full(5, -0.25), np.array([1, 0, 1, 0, 0]), np.zeros(5, np.int64))
    assert (report.auc, report.consistency, report.mean_gap, report.pairs) == (0.5, 1.0, 0.0, 6)


def test_auc_weighs_pairs_and_the_gap_weighs_groups() -> None:
    returns = np.array([1.0, 0.0, -1.0, 2.0, 2.0, 2.0])  # group 0: one pair, won; group 1: three pairs, lost
    report = order_report(returns, np.array([1, 0, 1, 0, 0, 0]), np.array([0, 0, 1, 1, 1, 1]))
    assert (report.auc, report.consistency, report.mean_gap) == (0.25, 0.5, (1.0 - 3.0) / 2)


@pytest.mark.parametrize("size", [4, 6])
def test_chance_level_of_auc_does_not_depend_on_the_group_size_and_that_of_consistency_does(size: int) -> None:
    """Over all orderings of a group: exact expectations under no signal."""
    for correct in range(1, size):
        orders = np.array(list(itertools.permutations(range(size))), dtype=np.float64)
        outcomes = np.tile(np.arange(size) < correct, len(orders)).astype(np.int8)
        report = order_report(orders.ravel(), outcomes, np.repeat(np.arange(len(orders)), size))
        assert report.auc == pytest.approx(0.5)
        assert report.consistency == pytest.approx(1 / math.comb(size, correct))


@pytest.mark.parametrize("size", [0, 1, 5])
@pytest.mark.parametrize("outcome", [-1, 0, 1])
def test_without_a_mixed_group_nothing_is_claimed(size: int, outcome: int) -> None:
    returns, outcomes = np.linspace(-1, 0, size), np.full(size, outcome, np.int8)
    report = order_report(returns, outcomes, np.zeros(size, np.int64))
    assert report.auc is None and report.consistency is None and report.mean_gap is None
    assert report.mixed_share == (0.0 if size and outcome != -1 else None)
    assert report.used == (0 if outcome == -1 else size) and report.used + report.excluded == size


def test_item_14_one_token_that_is_not_finite_does_not_poison_its_group() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        report = order_report(np.array([1.0, 0.0, bad]), np.array([1, 0, 0]), np.zeros(3, np.int64))
        assert (report.auc, report.mean_gap, report.excluded) == (1.0, 1.0, 1)


def test_close_float32_returns_far_from_zero_keep_their_gap() -> None:
    returns = np.array([1000.0001, 1000.0], dtype=np.float32)
    report = order_report(returns, np.array([1, 0]), np.zeros(2, np.int64))
    assert report.mean_gap == float(returns[0]) - float(returns[1])


@pytest.mark.parametrize("returns", [np.zeros(2), np.zeros(3, np.int64), np.array(["a"] * 3), [0.0] * 3, None])
def test_returns_of_another_type_or_length_are_errors(returns) -> None:
    with pytest.raises(DataError, match="returns"):
        order_report(returns, np.array([1, 0, 1]), np.zeros(3, np.int64))


def test_labels_must_fit_the_groups() -> None:
    arguments = np.zeros(3), np.array([1, 0, 1]), np.array([7, 7, 8])
    with pytest.raises(DataError, match="two labels") as caught:
        order_by_label(*arguments, np.array(["a", "b", "b"]))
    assert caught.value.got == "group 7"
    with pytest.raises(DataError, match="shape"):
        order_by_label(*arguments, np.array(["a", "a"]))
