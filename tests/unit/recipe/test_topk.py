"""Entropy, overlap and gate of top-k rows against loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.recipe.topk import entropy_gate, topk_entropy, topk_overlap

distributions = st.lists(st.floats(-8, 8), min_size=1, max_size=12).map(lambda logits: softmax(np.array(logits)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities, descending."""
    masses = np.exp(logits - logits.max())
    return np.sort(masses / masses.sum())[::-1]


def slow_entropy(masses: list[float]) -> float:
    return sum(-mass * math.log(mass) for mass in masses if mass > 0)


def log(masses: list[float] | np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(np.array(masses, np.float64))


# Entropy


@settings(deadline=None)
@given(distributions, st.data())
def test_entropy_matches_the_loop_and_is_a_lower_bound(masses, data) -> None:
    k = data.draw(st.integers(0, len(masses)))
    (found,) = topk_entropy(log(masses[:k])[None])
    assert found == pytest.approx(slow_entropy([*masses[:k], max(0.0, 1 - masses[:k].sum())]), abs=1e-12)
    assert -1e-12 <= found <= min(slow_entropy(list(masses)), math.log(k + 1)) + 1e-12
    if k + 1 >= len(masses):  # the bucket holds at most one token: nothing is merged
        assert found == pytest.approx(slow_entropy(list(masses)), abs=1e-12)


@settings(deadline=None)
@given(distributions)
def test_float32_log_probs_keep_the_bound_up_to_rounding(masses) -> None:
    for k in range(len(masses) + 1):
        (found,) = topk_entropy(log(masses[:k]).astype(np.float32)[None])
        assert 0 <= found <= slow_entropy(list(masses)) + 1e-5


def test_more_tokens_tell_more() -> None:
    logprobs = log(softmax(np.linspace(0, 4, 50)))
    entropies = [topk_entropy(logprobs[None, :k])[0] for k in range(51)]
    assert entropies[0] == 0 and (np.diff(entropies[:50]) > 0).all()


def test_entropies_by_hand() -> None:
    rows = np.array([log([0.25, 0.25, 0.25]), log([1.0, 0.0, 0.0]), log([0.5, 0.5, 0.0])])
    found = topk_entropy(rows)
    assert found.dtype == np.float64 and found == pytest.approx([math.log(4), 0.0, math.log(2)])


@pytest.mark.parametrize("excess", [1e-7, 1e-6, 1e-4])
def test_a_mass_that_rounds_above_1_leaves_no_rest(excess: float) -> None:
    rows = np.array([[excess, -np.inf], [math.log(0.5) + excess, math.log(0.5) + excess]], np.float32)
    found = topk_entropy(rows)
    assert found == pytest.approx([0.0, math.log(2)], abs=2 * excess) and (found >= 0).all()


def test_a_row_that_is_no_distribution_spoils_only_itself() -> None:
    rows = np.array([[math.nan, -1.0], [-0.5, math.nan], [-1.0, -1.5]])
    assert np.isnan(topk_entropy(rows)).tolist() == [True, True, False]
    assert entropy_gate(rows, -1.0).tolist() == [False, False, True]


# Overlap


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 6), st.randoms(use_true_random=False))
def test_overlap_matches_sets(k, rows, random) -> None:
    first, second = ([random.sample(range(12), k) for _ in range(rows)] for _ in range(2))
    found = topk_overlap(*(np.array(side, dtype=np.int64).reshape(rows, k) for side in (first, second)))
    assert found.tolist() == [len(set(a) & set(b)) / k for a, b in zip(first, second, strict=True)]


def test_overlap_does_not_depend_on_order_and_is_symmetric() -> None:
    first, second = np.array([[7, 1, 3, 2], [0, 1, 2, 3]]), np.array([[2, 9, 8, 1], [3, 2, 1, 0]])
    assert topk_overlap(first, second).tolist() == topk_overlap(second, first[:, ::-1]).tolist() == [0.5, 1.0]


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 0), (2, 0)), ((3,), (3,))])
def test_ids_of_another_shape_are_refused(shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected one \[R, K\]"):
        topk_overlap(*(np.zeros(shape, np.int64) for shape in shapes))


# Gate


def test_the_gate_is_open_above_the_threshold_only() -> None:
    rows = np.array([log([0.5, 0.5]), log([0.9, 0.1]), log([0.4, 0.3])])
    assert entropy_gate(rows, 0.6).tolist() == [True, False, True]
    assert entropy_gate(rows, topk_entropy(rows)[0]).tolist() == [False, False, True]  # strictly above
    assert not entropy_gate(rows, math.log(3) + 1e-9).any()


def test_nothing_gives_nothing() -> None:
    assert topk_entropy(np.empty((0, 4), np.float32)).shape == (0,)
    assert topk_overlap(np.empty((0, 4), np.int64), np.empty((0, 4), np.int64)).shape == (0,)
    assert entropy_gate(np.empty((0, 4), np.float32), 0.5).shape == (0,)
    assert topk_entropy(np.empty((2, 0), np.float32)).tolist() == [0.0, 0.0]
