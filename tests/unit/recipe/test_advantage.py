"""Advantages, masks and weights: values and signs against slow independent formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollouts import scored

from megatron_opd.config import ObjectiveConfig
from megatron_opd.recipe.advantage import distillation_gaps, gap_mask, token_gaps, token_weights, train_sample
from megatron_opd.records import Calibrated, Scored, TopRows


def calibrated(
    item: Scored, objective: ObjectiveConfig, *, offset: float = 0.0, outcome_term: float = 0.0
) -> Calibrated:
    gaps, mask = distillation_gaps(item, objective, 10.0)
    return Calibrated(item, gaps, mask, 0.0, offset, outcome_term, None, True, True)


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
    plain = ObjectiveConfig()
    sample = train_sample(
        calibrated(scored([-1, -1, -1], [-0.5, -30.0, -2.0]), plain, offset=0.25), plain, "sequence", 0
    )
    assert sample.token_ids.tolist() == [5, 6, 10, 11, 12] and sample.prompt_length == 2
    assert sample.advantages == pytest.approx([0.75, 0.0, -0.75])
    assert sample.weights == pytest.approx([0.5, 0.0, 0.5])
    assert sample.behaviour_logprobs.tolist() == [-1.0, -1.0, -1.0]
    assert sample.top_ids.shape == (3, 0) and not sample.forward_weights.any()


logprob = st.floats(-8, 0, width=32)
rows = st.lists(st.tuples(logprob, logprob, logprob), min_size=1, max_size=20)


@given(rows, st.floats(0.25, 2.0))
def test_a_teacher_scale_extrapolates_away_from_the_reference(rows: list[tuple], scale: float) -> None:
    student, teacher, reference = (list(column) for column in zip(*rows, strict=True))
    gaps, mask = distillation_gaps(
        scored(student, teacher, reference=reference), ObjectiveConfig(teacher_scale=scale), 10.0
    )
    for gap, kept, (s, t, r) in zip(gaps, mask, rows, strict=True):
        slow = scale * t + (1 - scale) * r - s
        assert gap == pytest.approx(slow, abs=1e-4)
        assert kept == (abs(t - s) < 10 and abs(slow) < 10) or abs(abs(slow) - 10) < 1e-3


def test_without_a_reference_a_teacher_scale_is_an_error_and_one_needs_none() -> None:
    with pytest.raises(ValueError, match="reference"):
        distillation_gaps(scored([-1.0], [-1.0]), ObjectiveConfig(teacher_scale=1.25), 10.0)
    with_reference = distillation_gaps(scored([-1.0], [-0.5], reference=[-9.0]), ObjectiveConfig(), 10.0)
    assert with_reference[0] == pytest.approx([0.5])


def test_clips_are_one_sided_and_act_after_the_mask() -> None:
    item = scored([0, 0, 0, 0], [-12.0, -5.0, -0.5, 3.0])
    floor = distillation_gaps(item, ObjectiveConfig(gap_floor=-2.0), 10.0)
    assert floor[0].tolist() == [-2.0, -2.0, -0.5, 3.0] and floor[1].tolist() == [False, True, True, True]
    assert distillation_gaps(item, ObjectiveConfig(gap_ceiling=1.0), 10.0)[0].tolist() == [-12.0, -5.0, -0.5, 1.0]


def test_a_domain_weight_scales_every_term_and_no_denominator() -> None:
    objective = ObjectiveConfig(domain_weights={"code": 3.0})
    math_item, code_item = scored([-1.0], [-0.5]), scored([-1.0], [-0.5], domain="code")
    samples = [
        train_sample(calibrated(item, objective, offset=0.25, outcome_term=1.0), objective, "sequence", 0)
        for item in (math_item, code_item)
    ]
    assert samples[0].advantages == pytest.approx([1.75]) and samples[1].advantages == pytest.approx([5.25])
    assert samples[0].weights.tolist() == samples[1].weights.tolist() == [1.0]


def test_the_forward_kl_weighs_only_open_and_unmasked_positions() -> None:
    sure, unsure = np.log([0.98, 0.01]), np.log([0.5, 0.4])
    top = TopRows(np.array([[1, 2]] * 3), np.array([sure, unsure, unsure], np.float32))
    objective = ObjectiveConfig(forward_kl=0.5, forward_kl_entropy=0.5, domain_weights={"math": 2.0})
    item = scored([-1.0, -1.0, -1.0], [-1.0, -1.0, -40.0], top=top)
    sample = train_sample(calibrated(item, objective), objective, "sequence", 0)
    assert sample.forward_weights == pytest.approx([0.0, 2.0 * 0.5 * 0.5, 0.0])
    assert sample.top_ids.tolist() == top.ids.tolist() and sample.top_logprobs.tolist() == top.logprobs.tolist()
    with pytest.raises(ValueError, match="top-k rows"):
        train_sample(calibrated(scored([-1.0], [-1.0]), objective), objective, "sequence", 0)


def test_a_token_knows_its_lag_and_how_its_advantage_follows_the_students_log_prob() -> None:
    objective = ObjectiveConfig(domain_weights={"math": 3.0}, gap_floor=-1.0, gap_ceiling=2.0)
    item = scored([-1.0, -1.0, -4.0], [-1.5, -3.0, -0.5])  # gaps -0.5, -2 and 3.5: two of them are held
    sample = train_sample(calibrated(item, objective), objective, "sequence", 2)
    assert sample.lags.tolist() == [2, 2, 2] and sample.slopes.tolist() == [3.0, 0.0, 0.0]
    moved = scored([-1.25, -1.25, -4.25], [-1.5, -3.0, -0.5])
    later = train_sample(calibrated(moved, objective), objective, "sequence", 2)
    assert later.advantages == pytest.approx(sample.advantages + 0.25 * sample.slopes)
