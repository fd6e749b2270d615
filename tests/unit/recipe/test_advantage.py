"""Advantages, masks and weights: values and signs against slow independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_opd.recipe.advantage import gap_mask, token_gaps, token_weights, train_sample
from megatron_opd.records import Outcome, Prompt, Rollout, Scored, Verified


def scored(prompt_ids: list[int], response_ids: list[int], student: list[float], teacher: list[float]) -> Scored:
    """A scored rollout with the given numbers."""
    prompt = Prompt("p", "math", "?", tuple(prompt_ids), "1")
    rollout = Rollout(
        prompt=prompt,
        group=0,
        token_ids=np.array(response_ids),
        logprobs=np.array(student, np.float32),
        versions=np.zeros(len(response_ids), np.int64),
        finish_reason="stop",
        text="",
    )
    return Scored(Verified(rollout, Outcome.CORRECT, "equal"), "math", np.array(teacher, np.float32))


def test_the_advantage_is_positive_where_the_teacher_prefers_the_token() -> None:
    gaps = token_gaps(np.array([-0.1, -2.0], np.float32), np.array([-1.1, -0.5], np.float32))
    assert gaps == pytest.approx([1.0, -1.5])


def test_lengths_that_differ_are_an_error() -> None:
    with pytest.raises(ValueError, match="log-probs"):
        token_gaps(np.zeros(2, np.float32), np.zeros(3, np.float32))


def test_the_mask_excludes_the_bound_itself_and_what_is_not_finite() -> None:
    gaps = np.array([9.99, 10.0, -10.0, -9.99, math.nan, math.inf, -math.inf], np.float32)
    assert gap_mask(gaps, 10.0).tolist() == [True, False, False, True, False, False, False]


@given(st.lists(st.booleans(), max_size=40))
def test_weights_of_a_sequence_sum_to_one_or_nothing(mask: list[bool]) -> None:
    array = np.array(mask, dtype=bool)
    by_sequence, by_token = token_weights(array, "sequence"), token_weights(array, "token")
    assert by_sequence.sum() == pytest.approx(1.0 if any(mask) else 0.0, abs=1e-5)
    assert by_token.tolist() == [1.0 if valid else 0.0 for valid in mask]
    assert (by_sequence[~array] == 0).all() and np.isfinite(by_sequence).all()


def test_a_masked_token_leaves_numerator_and_denominator() -> None:
    sample = train_sample(scored([5, 6], [7, 8, 2], [-1, -1, -1], [-0.5, -30.0, -2.0]), 10.0, "sequence")
    assert sample.token_ids.tolist() == [5, 6, 7, 8, 2] and sample.prompt_length == 2
    assert sample.advantages == pytest.approx([0.5, 0.0, -1.0])
    assert sample.weights == pytest.approx([0.5, 0.0, 0.5])
    assert sample.behaviour_logprobs.tolist() == [-1.0, -1.0, -1.0]
