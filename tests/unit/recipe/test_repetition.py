"""Repeated n-grams against a set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.recipe.repetition import repetition


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 6))
def test_share_matches_a_walk_with_a_set(tokens, n) -> None:
    seen, repeated, total = set(), 0, max(0, len(tokens) - n + 1)
    for start in range(total):
        gram = tuple(tokens[start : start + n])
        repeated += gram in seen
        seen.add(gram)
    found = repetition(np.array(tokens, dtype=np.int64), n)
    assert type(found) is float and found == pytest.approx(repeated / total if total else 0.0, abs=1e-12)


def test_by_hand() -> None:
    assert repetition(np.array([1, 2, 1, 2, 1]), 2) == 0.5  # 12 21 12 21
    assert repetition(np.array([1, 1, 1, 1]), 2) == pytest.approx(2 / 3)
    assert repetition(np.arange(100), 3) == 0.0
    assert repetition(np.array([2, 1, 1, 2]), 2) == 0.0  # order counts: 21 11 12


@pytest.mark.parametrize(("tokens", "n"), [([], 1), ([1, 1, 1], 4), ([5, 5], 2), ([5], 1)])
def test_too_short_to_repeat(tokens: list[int], n: int) -> None:
    assert repetition(np.array(tokens, dtype=np.int64), n) == 0.0


def test_a_loop_tends_to_1() -> None:
    assert repetition(np.tile(np.arange(7), 1000), 4) == pytest.approx(1 - 7 / 6997)


def test_ids_far_apart_are_not_confused() -> None:
    tokens = np.array([2**40, 0, 0, 2**40, -(2**62), 2**62], dtype=np.int64)
    assert repetition(tokens, 2) == 0.0


@pytest.mark.parametrize("distinct", [2, 3, 2**16, 2**16 + 1])
def test_n_grams_of_any_width_are_counted_exactly(distinct: int) -> None:
    tokens = np.concatenate([np.arange(distinct), [0, 1, 2, 3, distinct - 1, 0]]) % distinct * 1000
    grams = [tuple(tokens[i : i + 4]) for i in range(len(tokens) - 3)]
    assert repetition(tokens, 4) == pytest.approx(1 - len(set(grams)) / len(grams), abs=1e-12)


@pytest.mark.parametrize("n", [0, -1])
def test_n_below_1_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"n = {n}"):
        repetition(np.array([1]), n)
