"""Online balancing: counts against exact fractions, choices that repeat, and the authors' flaws by name."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_opd.config import BalanceConfig
from megatron_opd.errors import DataError
from megatron_opd.recipe.balance import (
    balance,
    kept_counts,
    random_keys,
    rank_within,
    ratio_band,
    refill_needed,
)
from megatron_opd.recipe.labels import check_labels
from megatron_opd.records import Outcome

ratios = st.sampled_from(
    [Fraction(*pair) for pair in ((1, 1), (1, 2), (2, 1), (6, 5), (3, 4), (3, 2), (7, 1), (41, 40))]
)
tolerances = st.sampled_from([Fraction(0), Fraction(1, 20), Fraction(1, 4), Fraction(1)])
counts = st.integers(0, 14)
labels = st.lists(st.tuples(st.sampled_from([1, 0, -1]), st.integers(-3, 4)), max_size=60)


def arrays(rows: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    outcomes = np.array([outcome for outcome, _ in rows], dtype=np.int8)
    return outcomes, np.array([group for _, group in rows], dtype=np.int64)


def group_of(correct: int, incorrect: int, unknown: int = 0, group: int = 0) -> tuple[np.ndarray, np.ndarray]:
    outcomes = np.array([1] * correct + [0] * incorrect + [-1] * unknown, dtype=np.int8)
    return outcomes, np.full(len(outcomes), group, dtype=np.int64)


def kept(correct: int, incorrect: int, **options: object) -> tuple[int, int]:
    kept_correct, kept_incorrect = kept_counts(
        np.array([correct]),
        np.array([incorrect]),
        BalanceConfig(**options),  # type: ignore[arg-type]
    )
    return int(kept_correct[0]), int(kept_incorrect[0])


def slow_counts(correct: int, incorrect: int, ratio: Fraction, tolerance: Fraction) -> tuple[int, int]:
    """Every pair tried, in exact arithmetic."""
    pairs = [(a, b) for a in range(1, correct + 1) for b in range(1, incorrect + 1)]
    in_band = [(a, b) for a, b in pairs if ratio / (1 + tolerance) <= Fraction(a, b) <= ratio * (1 + tolerance)]
    if in_band:
        return max(in_band, key=sum)
    return min(pairs, key=lambda pair: (max(Fraction(*pair) / ratio, ratio / Fraction(*pair)), -sum(pair)))


def in_band(correct: int, incorrect: int, options: BalanceConfig) -> bool:
    low, high = ratio_band(options)
    return low <= correct / incorrect <= high


# Counts


@settings(deadline=None)
@given(st.lists(st.tuples(counts, counts), max_size=8), ratios, tolerances)
def test_counts_match_the_search_over_all_pairs(groups, ratio, tolerance) -> None:
    options = BalanceConfig(ratio=float(ratio), tolerance=float(tolerance))
    correct, incorrect = (np.array([group[side] for group in groups], dtype=np.int64) for side in (0, 1))
    result = list(zip(*(side.tolist() for side in kept_counts(correct, incorrect, options)), strict=True))
    assert result == [slow_counts(a, b, ratio, tolerance) if a and b else (a, b) for a, b in groups]


@given(st.integers(1, 40), st.integers(1, 40), st.floats(0.05, 20.0), st.floats(0.0, 2.0))
def test_the_ratio_is_within_tolerance_whenever_any_counts_are(correct, incorrect, ratio, tolerance) -> None:
    options = BalanceConfig(ratio=ratio, tolerance=tolerance)
    a, b = kept(correct, incorrect, ratio=ratio, tolerance=tolerance)
    assert 1 <= a <= correct and 1 <= b <= incorrect
    reachable = any(in_band(x, y, options) for x in range(1, correct + 1) for y in range(1, incorrect + 1))
    assert in_band(a, b, options) == reachable
    if in_band(correct, incorrect, options):
        assert (a, b) == (correct, incorrect)


@given(st.integers(1, 30), st.integers(1, 30), ratios, tolerances)
def test_exchanging_the_classes_exchanges_the_counts(correct, incorrect, ratio, tolerance) -> None:
    forward = kept(correct, incorrect, ratio=float(ratio), tolerance=float(tolerance))
    backward = kept(incorrect, correct, ratio=float(1 / ratio), tolerance=float(tolerance))
    assert forward == backward[::-1]


@given(st.integers(1, 200), st.integers(1, 200))
def test_ratio_one_keeps_the_smaller_class_of_each(correct, incorrect) -> None:
    assert kept(correct, incorrect) == (min(correct, incorrect),) * 2


def test_item_10_counts_are_not_truncated_before_they_are_compared() -> None:
    assert kept(1, 15, ratio=2.0) == (1, 1)  # the release leaves 1:15
    assert kept(15, 1, ratio=0.5) == (1, 1)  # the release leaves 15:1
    assert kept(2, 14, ratio=1.2) == (2, 2)  # the release makes 2:1 of it
    assert kept(14, 2, ratio=1.2) == (2, 2)
    assert kept(14, 2) == (2, 2) and kept(4, 12) == (4, 4)


def test_tolerance_zero_is_exact_and_a_tolerance_saves_rollouts() -> None:
    assert kept(8, 8, ratio=1.2) == (6, 5)
    assert kept(8, 8, ratio=1.2, tolerance=0.2) == (8, 8)
    assert kept(12, 8, tolerance=0.25) == (10, 8)


@pytest.mark.parametrize(
    ("correct", "incorrect", "ratio", "tolerance"),
    [(3, 9, 0.4, 0.2), (7, 8, 1.05, 0.2), (13, 12, 1.3, 0.2), (7, 4, 2.1, 0.2), (15, 11, 15 / 11, 0.0)],
)
def test_the_bounds_of_the_band_belong_to_it_in_spite_of_rounding(correct, incorrect, ratio, tolerance) -> None:
    assert kept(correct, incorrect, ratio=ratio, tolerance=tolerance) == (correct, incorrect)


@pytest.mark.parametrize("ratio", [1e-300, 1e-6, 1e6, 1e300])
def test_extreme_ratios_keep_both_classes(ratio: float) -> None:
    assert kept(9, 9, ratio=ratio) == ((9, 1) if ratio > 1 else (1, 9))


@pytest.mark.parametrize(
    ("policy", "expected"), [({}, 16), ({"one_sided": "subsample"}, 2), ({"one_sided": "drop"}, 0)]
)
def test_one_sided_groups_follow_their_policy(policy: dict, expected: int) -> None:
    for outcomes, groups in (group_of(16, 0), group_of(0, 16)):
        result = balance(outcomes, groups, BalanceConfig(**policy), 0, 0)
        assert result.keep.sum() == expected and result.report.one_sided_groups == 1
    assert kept(3, 3, **policy) == (3, 3) and kept(0, 0, **policy) == (0, 0)


def test_item_10_subsampling_takes_the_surplus_weight_from_one_sided_groups() -> None:
    """The release keeps 4 of a 14:2 group and 16 of a 16:0 group: the less a prompt can teach, the more it counts."""
    sizes = [
        int(balance(*group_of(c, 16 - c), BalanceConfig(one_sided="subsample"), 0, 0).keep.sum()) for c in range(17)
    ]
    assert sizes == [2] + [2 * min(c, 16 - c) for c in range(1, 16)] + [2]


def test_subsample_keeps_what_there_is_when_that_is_less() -> None:
    assert kept(3, 0, one_sided="subsample", one_sided_samples=5) == (3, 0)


# Unknown outcomes


def test_item_8_unknown_is_never_counted_as_incorrect() -> None:
    """The release balances against everything that is not True, a verifier that failed included."""
    result = balance(*group_of(8, 0, unknown=8), BalanceConfig(), 0, 0)
    assert result.keep.all() and result.report.one_sided_groups == 1
    result = balance(*group_of(6, 2, unknown=8), BalanceConfig(), 0, 0)
    assert (result.report.correct_after, result.report.incorrect_after, result.report.unknown_after) == (2, 2, 8)


def test_unknown_outcomes_follow_their_own_policy() -> None:
    outcomes, groups = group_of(3, 0, unknown=4)
    result = balance(outcomes, groups, BalanceConfig(one_sided="drop"), 0, 0)
    assert result.keep.tolist() == [False] * 3 + [True] * 4
    result = balance(outcomes, groups, BalanceConfig(unknown="drop"), 0, 0)
    assert result.keep.tolist() == [True] * 3 + [False] * 4
    assert balance(*group_of(0, 0, unknown=5), BalanceConfig(one_sided="drop"), 0, 0).keep.all()


@given(labels, st.sampled_from(["group", "global"]), ratios, st.integers(0, 5))
def test_unknown_outcomes_change_no_count_of_the_others(rows, scope, ratio, step) -> None:
    options = BalanceConfig(scope=scope, ratio=float(ratio), unknown="drop")
    graded = [row for row in rows if row[0] != -1]
    with_unknown = balance(*arrays(rows), options, 3, step).report
    without = balance(*arrays(graded), options, 3, step).report
    assert with_unknown.correct_after == without.correct_after
    assert with_unknown.incorrect_after == without.incorrect_after and with_unknown.unknown_after == 0


# Choice


@settings(deadline=None)
@given(labels, ratios, st.sampled_from(["keep", "subsample", "drop"]), st.sampled_from(["keep", "drop"]))
def test_the_step_matches_a_loop_over_groups(rows, ratio, one_sided, unknown) -> None:
    outcomes, groups = arrays(rows)
    options = BalanceConfig(ratio=float(ratio), one_sided=one_sided, unknown=unknown)
    result = balance(outcomes, groups, options, seed=5, step=7)
    touched = 0
    for group in set(groups.tolist()):
        own = groups == group
        alone = balance(outcomes[own], groups[own], options, seed=5, step=7)
        assert result.keep[own].tolist() == alone.keep.tolist()
        number = {outcome: int((outcomes[own] == outcome).sum()) for outcome in Outcome}
        left = {outcome: int((outcomes[own & result.keep] == outcome).sum()) for outcome in Outcome}
        a, b = kept(number[Outcome.CORRECT], number[Outcome.INCORRECT], ratio=float(ratio), one_sided=one_sided)
        assert left == {
            Outcome.CORRECT: a,
            Outcome.INCORRECT: b,
            Outcome.UNKNOWN: number[Outcome.UNKNOWN] if unknown == "keep" else 0,
        }
        touched += left != number
    assert result.report.touched_groups == touched


@given(labels, st.randoms(use_true_random=False), st.integers(-(2**40), 2**40), st.integers(0, 9))
def test_order_of_the_groups_changes_no_group(rows, random, seed, step) -> None:
    outcomes, groups = arrays(rows)
    ids = sorted(set(groups.tolist()))
    random.shuffle(ids)
    order = np.array([i for group in ids for i in np.flatnonzero(groups == group)], dtype=np.int64)
    for scope in ("group", "global"):
        options = BalanceConfig(scope=scope)
        plain, moved = (
            balance(outcomes, groups, options, seed, step),
            balance(outcomes[order], groups[order], options, seed, step),
        )
        assert moved.keep.tolist() == plain.keep[order].tolist() and moved.report == plain.report


def test_another_group_that_changes_does_not_change_a_choice() -> None:
    outcomes, groups = (np.concatenate(pair) for pair in zip(group_of(12, 4), group_of(3, 13, group=1), strict=True))
    changed = outcomes.copy()
    changed[16:] = 0
    first = balance(outcomes, groups, BalanceConfig(), 1, 2).keep[:16]
    assert first.tolist() == balance(changed, groups, BalanceConfig(), 1, 2).keep[:16].tolist()


def test_seed_and_step_decide_and_repeat() -> None:
    outcomes, groups = np.tile(group_of(14, 2)[0], 64), np.repeat(np.arange(64), 16)
    choice = {
        (seed, step): balance(outcomes, groups, BalanceConfig(), seed, step).keep.tobytes()
        for seed in (0, 1, -1)
        for step in (0, 1, 2)
    }
    again = {key: balance(outcomes, groups, BalanceConfig(), *key).keep.tobytes() for key in choice}
    assert choice == again and len(set(choice.values())) == len(choice)
    rows = balance(outcomes, groups, BalanceConfig(), 0, 0).keep.reshape(64, 16)
    assert len({row.tobytes() for row in rows}) > 32  # groups that look alike are drawn differently


def test_the_draw_is_uniform_over_the_members() -> None:
    outcomes, groups = np.tile(group_of(14, 2)[0], 2000), np.repeat(np.arange(2000), 16)
    share = balance(outcomes, groups, BalanceConfig(), 0, 0).keep.reshape(2000, 16)[:, :14].mean(axis=0)
    assert abs(share - 2 / 14).max() < 5 * math.sqrt(2 / 14 * 12 / 14 / 2000)


def slow_key(*words: int) -> int:
    """SplitMix64's finaliser over the words, in Python's own integers."""
    key = 0
    for word in words:
        key = ((key ^ (word % 2**64)) + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        key ^= key >> 31
    return key


@given(st.integers(-(2**70), 2**70), st.integers(0, 10**6), st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5))
def test_keys_are_the_same_everywhere(seed, step, groups) -> None:
    ranks = np.arange(len(groups))
    keys = random_keys(seed, step, np.array(groups, dtype=np.int64), ranks)
    assert keys.tolist() == [slow_key(seed, step, group, rank) for rank, group in enumerate(groups)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_ranks_count_the_rows_before(rows) -> None:
    parts, keys = (np.array([row[side] for row in rows], dtype=np.int64) for side in (0, 1))
    slow = [sum(p == q and (k, j) < (key, i) for j, (q, k) in enumerate(rows)) for i, (p, key) in enumerate(rows)]
    assert rank_within(parts, keys).tolist() == slow


# Scope, report, refill


def test_the_global_scope_balances_the_step_and_not_the_groups() -> None:
    outcomes, groups = (np.concatenate(pair) for pair in zip(group_of(12, 4), group_of(2, 6, group=1), strict=True))
    result = balance(outcomes, groups, BalanceConfig(scope="global"), 0, 0)
    report = result.report
    assert (report.correct_after, report.incorrect_after, report.groups) == (10, 10, 2)
    one_sided = np.concatenate([group_of(8, 0)[0], group_of(0, 8)[0]])
    assert balance(one_sided, np.repeat([0, 1], 8), BalanceConfig(scope="global", one_sided="drop"), 0, 0).keep.all()


@given(labels, st.sampled_from(["group", "global"]), ratios, tolerances)
def test_the_report_counts_what_the_mask_says(rows, scope, ratio, tolerance) -> None:
    outcomes, groups = arrays(rows)
    result = balance(outcomes, groups, BalanceConfig(scope=scope, ratio=float(ratio), tolerance=float(tolerance)), 0, 1)
    report = result.report
    assert result.keep.dtype == bool and result.keep.shape == outcomes.shape
    for name, outcome in (("correct", 1), ("incorrect", 0), ("unknown", -1)):
        assert getattr(report, f"{name}_before") == (outcomes == outcome).sum()
        assert getattr(report, f"{name}_after") == (outcomes[result.keep] == outcome).sum()
    assert report.kept_share == (pytest.approx(result.keep.mean()) if rows else 1.0)
    assert report.touched_groups == len(set(groups[~result.keep].tolist()))
    assert report.groups == len(set(groups.tolist()))


def test_groups_that_cannot_reach_the_band_are_reported() -> None:
    outcomes, groups = (np.concatenate(pair) for pair in zip(group_of(1, 15), group_of(8, 8, group=1), strict=True))
    assert balance(outcomes, groups, BalanceConfig(ratio=2.0), 0, 0).report.out_of_band == 1


def test_a_step_without_a_rollout() -> None:
    result = balance(np.empty(0, np.int8), np.empty(0, np.int64), BalanceConfig(), 0, 0)
    assert len(result.keep) == 0 and result.report.kept_share == 1.0 and result.report.groups == 0


@given(st.lists(st.booleans(), max_size=50), st.integers(0, 100), st.integers(1, 16))
def test_refill_makes_up_the_step(mask, target, per_prompt) -> None:
    refill = refill_needed(np.array(mask, dtype=bool), target, per_prompt)
    assert refill.rollouts == max(0, target - sum(mask))
    share = Fraction(sum(mask), len(mask)) if any(mask) else 1
    assert refill.prompts == math.ceil(Fraction(refill.rollouts) / (per_prompt * share))


# Bad input


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "sample"},
        {"one_sided": True},
        {"unknown": "incorrect"},
        *[{"ratio": value} for value in (0, -1.0, math.nan, math.inf, "1", True)],
        *[{"tolerance": value} for value in (-0.1, math.nan, math.inf, None)],
        *[{"one_sided_samples": value} for value in (0, -1, 1.0, True)],
    ],
)
def test_options_out_of_range_name_what_they_got_and_what_fits(options: dict) -> None:
    with pytest.raises(ValidationError) as caught:
        BalanceConfig(**options)
    (mistake,) = caught.value.errors()
    ((name, value),) = options.items()
    assert mistake["loc"] == (name,) and mistake["msg"]
    assert mistake["input"] == value or math.isnan(mistake["input"])


def test_the_defaults_are_the_papers() -> None:
    assert BalanceConfig().model_dump() == {
        "scope": "group",
        "ratio": 1.0,
        "tolerance": 0.0,
        "one_sided": "keep",
        "one_sided_samples": 2,
        "unknown": "keep",
        "order": "before_scoring",
        "refill_rounds": 0,
    }


@pytest.mark.parametrize(
    ("outcomes", "groups"),
    [
        ([1, 0], np.array([0, 0])),
        (np.array([True, False]), np.array([0, 0])),
        (np.array([1.0, 0.0]), np.array([0, 0])),
        (np.array([True, None]), np.array([0, 0])),
        (np.array([1, 2]), np.array([0, 0])),
        (np.array([1, -2]), np.array([0, 0])),
        (np.array([1, 0]), np.array([0])),
        (np.array([1, 0]), np.array([0.0, 0.0])),
        (np.array([1, 0]), None),
        (np.array([[1, 0]]), np.array([[0, 0]])),
    ],
)
def test_item_8_labels_of_another_type_are_errors(outcomes, groups) -> None:
    with pytest.raises(DataError):
        check_labels(outcomes, groups)


def test_refill_refuses_what_is_no_size() -> None:
    with pytest.raises(ValueError, match="target -1"):
        refill_needed(np.ones(3, bool), -1)
    with pytest.raises(ValueError, match="samples_per_prompt 0"):
        refill_needed(np.ones(3, bool), 1, 0)
