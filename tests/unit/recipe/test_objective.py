"""A whole step through the recipe, against a slow loop over tokens; and what each option does to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollouts import recipe, scored

from megatron_opd.config import Config
from megatron_opd.recipe.objective import StepObjective, step_objective
from megatron_opd.records import Scored

UNI_OPD = recipe("conf/recipe/uni_opd_text.yaml")


def run(items: list[Scored], config: Config, balanced: list[bool] | None = None, step: int = 0) -> StepObjective:
    kept = np.array([True] * len(items) if balanced is None else balanced, dtype=bool)
    return step_objective(items, kept, config, step)


def group_of_four() -> list[Scored]:
    """Two right and two wrong; the teacher prefers the wrong ones. Mean gaps: -1.0, -0.6 and -0.2, 0.0."""
    return [
        scored([-1, -1], [-2.5, -1.5], outcome=1),
        scored([-1], [-1.6], outcome=1),
        scored([-1, -1, -1], [-1.3, -1.2, -1.1], outcome=0),
        scored([-1], [-1.0], outcome=0),
    ]


def slow_advantages(items: list[Scored], delta: float) -> list[list[float]]:
    """Mean margin, group scope, spread: token by token."""
    gaps = [[t - s for t, s in zip(i.teacher_logprobs, i.verified.rollout.logprobs, strict=True)] for i in items]
    valid = [[gap for gap in row if abs(gap) < 10] for row in gaps]
    returns = [sum(row) / len(row) if row else math.nan for row in valid]
    result = []
    for index, item in enumerate(items):
        own = [k for k, other in enumerate(items) if other.verified.rollout.group == item.verified.rollout.group]
        own = [k for k in own if not math.isnan(returns[k])]
        good = [returns[k] for k in own if items[k].verified.outcome == 1]
        bad = [returns[k] for k in own if items[k].verified.outcome == 0]
        offset = 0.0
        if good and bad and item.verified.outcome != -1 and index in own:
            shift = max(0.0, delta - (sum(good) / len(good) - sum(bad) / len(bad)))
            offset = shift / 2 if item.verified.outcome == 1 else -shift / 2
        result.append([gap + offset if abs(gap) < 10 else 0.0 for gap in gaps[index]])
    return result


logprob = st.floats(-14, 0, width=32)
tokens = st.lists(st.tuples(logprob, logprob), min_size=1, max_size=6)
rollouts = st.lists(st.tuples(tokens, st.sampled_from([1, 0, -1]), st.integers(0, 2)), min_size=1, max_size=12)


@settings(deadline=None)
@given(rollouts)
def test_the_papers_text_recipe_is_that_of_the_slow_loop(drawn: list[tuple]) -> None:
    items = [
        scored([s for s, _ in row], [t for _, t in row], outcome=outcome, group=group) for row, outcome, group in drawn
    ]
    result = run(items, UNI_OPD)
    for sample, expected in zip(result.samples, slow_advantages(items, 0.4), strict=True):
        assert sample.advantages == pytest.approx(expected, abs=1e-4)


def test_plain_distillation_adds_nothing() -> None:
    result = run(group_of_four(), recipe())
    assert result.calibration is None and [item.offset for item in result.rollouts] == [0.0] * 4
    assert result.samples[0].advantages == pytest.approx([-1.5, -0.5])
    assert [item.mean_gap for item in result.rollouts] == pytest.approx([-1.0, -0.6, -0.2, 0.0])


def test_calibration_moves_right_up_and_wrong_down() -> None:
    result = run(group_of_four(), UNI_OPD)
    shift = 0.4 - (-0.8 + 0.1)
    assert [item.offset for item in result.rollouts] == pytest.approx([shift / 2, shift / 2, -shift / 2, -shift / 2])
    assert result.samples[0].advantages == pytest.approx([-1.5 + shift / 2, -0.5 + shift / 2])
    assert [item.mean_gap for item in result.rollouts] == pytest.approx([-1.0, -0.6, -0.2, 0.0])  # before the shift


def test_flaw_10_what_balancing_dropped_is_neither_trained_nor_in_the_denominator() -> None:
    balanced = [True, False, True, True]
    result = run(group_of_four(), UNI_OPD, balanced)
    assert [item.trained for item in result.rollouts] == balanced == [item.balanced for item in result.rollouts]
    assert len(result.samples) == 3
    # After scoring it counts in the margin, though: that is what order "after_scoring" asks for.
    assert result.rollouts[0].offset == run(group_of_four(), UNI_OPD).rollouts[0].offset


def test_flaw_13_and_14_a_bad_number_shifts_nobody_and_is_not_shifted() -> None:
    for bad in (math.nan, math.inf, -math.inf, -100.0):
        spoilt = [*group_of_four(), scored([-1.0], [bad], outcome=1)]
        result, clean = run(spoilt, UNI_OPD), run(group_of_four(), UNI_OPD)
        assert [item.offset for item in result.rollouts[:4]] == [item.offset for item in clean.rollouts]
        assert result.rollouts[4].offset == 0.0 and math.isnan(result.rollouts[4].mean_gap)
        assert not result.samples[4].weights.any() and not result.samples[4].advantages.any()


def test_flaw_15_a_masked_token_is_in_no_return() -> None:
    items = group_of_four()
    items[0] = scored([-1, -1, -1], [-2.5, -1.5, -31.0], outcome=1)
    assert run(items, UNI_OPD).rollouts[0].mean_gap == pytest.approx(-1.0)


def test_the_margin_mask_and_the_sign_filter_take_rollouts_out() -> None:
    masked = run(group_of_four(), recipe("calibration.method=mask_group", "calibration.delta=0.0"))
    assert not any(item.trained for item in masked.rollouts) and all(item.balanced for item in masked.rollouts)
    assert masked.samples == []
    filtered = run(group_of_four(), recipe("objective.sign_filter=true"))  # right below 0, wrong at or below 0
    assert [item.trained for item in filtered.rollouts] == [False, False, True, True]


def test_outcome_terms_are_added_to_trained_tokens() -> None:
    grpo = run(group_of_four(), recipe("objective.group_advantage=0.5"))
    assert [item.outcome_term for item in grpo.rollouts] == pytest.approx([0.5, 0.5, -0.5, -0.5])
    assert grpo.samples[3].advantages == pytest.approx([-0.5])
    constant = run(group_of_four(), recipe("objective.constant_reward=0.6", "objective.constant_direction=lift"))
    assert [item.outcome_term for item in constant.rollouts] == pytest.approx([0.6, 0.6, 0.0, 0.0])


def test_the_control_equals_calibration_where_the_teacher_says_nothing() -> None:
    """P2: with all returns equal, calibration is a constant outcome reward of weight delta."""
    silent = [scored([-1.0], [-1.5], outcome=outcome) for outcome in (1, 0, 0, 1, -1)] + [scored([-1.0], [-99.0])]
    calibrated = run(silent, UNI_OPD)
    control = run(silent, recipe("objective.constant_reward=0.4"))
    assert [item.offset for item in calibrated.rollouts] == pytest.approx([i.outcome_term for i in control.rollouts])


def test_a_placebo_shifts_as_many_but_not_by_their_outcome() -> None:
    items = group_of_four() * 8
    for place, item in enumerate(items):
        items[place] = scored(
            item.verified.rollout.logprobs.tolist(),
            item.teacher_logprobs.tolist(),
            outcome=item.verified.outcome,
            group=place // 4,
        )
    placebo = recipe("conf/recipe/uni_opd_text.yaml", "objective.placebo=true")
    first, again, other = run(items, placebo, step=3), run(items, placebo, step=3), run(items, placebo, step=4)
    signs = [[np.sign(item.offset) for item in result.rollouts] for result in (first, again, other)]
    assert signs[0] == signs[1] != signs[2]
    true = [1 if item.verified.outcome == 1 else -1 for item in items]
    agreement = np.mean([sign == label for sign, label in zip(signs[0], true, strict=True)])
    assert 0.2 < agreement < 0.8
    assert [item.scored.verified.outcome for item in first.rollouts] == [item.verified.outcome for item in items]


def test_an_empty_step_has_no_sample() -> None:
    result = run([], UNI_OPD)
    assert result.rollouts == [] and result.samples == []
