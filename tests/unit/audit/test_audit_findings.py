"""What is said, and when."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from audit_case import Drawn

from megatron_opd.audit.diagnose import Diagnosis
from megatron_opd.audit.findings import Finding, findings
from megatron_opd.audit.numbers import Numbers
from megatron_opd.config import CalibrationConfig


def said(drawn: Drawn, **changes: object) -> list[Finding]:
    """Findings about the domain math, with some of its numbers changed; those of ``order`` have the prefix order_."""
    numbers = drawn.diagnosis.by_domain["math"]
    order = {name.removeprefix("order_"): changes.pop(name) for name in list(changes) if name.startswith("order_")}
    numbers = replace(numbers, order=replace(numbers.order, **order), **changes)
    return findings(only(drawn.diagnosis, numbers), drawn.rollouts, drawn.config)


def only(diagnosis: Diagnosis, numbers: Numbers) -> Diagnosis:
    return replace(diagnosis, by_domain={"math": numbers}, early={}, late={}, violations=[])


def one(found: list[Finding], words: str) -> Finding:
    (match,) = [item for item in found if words in item.text]
    return match


@pytest.mark.parametrize(
    ("auc", "error", "level", "words"),
    [
        (0.40, 0.02, "act", "below chance"),
        (0.47, 0.02, "look", "not distinguishable from chance"),
        (0.53, 0.02, "look", "not distinguishable from chance"),
        (0.55, 0.02, "look", "orders right above wrong in 55 % of pairs (standard error 2.0 points): close to chance."),
        (0.65, 0.02, "note", "a weak order"),
        (0.80, 0.02, "fine", "a clear order"),
        (0.80, None, "note", "too few mixed groups"),
    ],
)
def test_the_teachers_order(drawn: Drawn, auc: float, error: float | None, level: str, words: str) -> None:
    assert one(said(drawn, order_auc=auc, auc_error=error), words).level == level


def test_nothing_is_said_about_an_order_that_is_not_there(drawn: Drawn) -> None:
    gone = {name: None for name in ("auc_error", "chance_consistency", "deviation", "changed_groups", "mean_gap_after")}
    found = said(drawn, order_auc=None, order_consistency=None, order_mean_gap=None, order_mixed_share=0.0, **gone)
    assert one(found, "n/a: no group").level == "look"
    assert one(found, "Only 0 % of groups are mixed").level == "look"
    assert not [item for item in found if "Calibration moved" in item.text]


def test_a_shift_of_many_deviations_is_named(drawn: Drawn) -> None:
    small = said(drawn, order_mean_gap=0.1, mean_gap_after=0.2, deviation=0.1, changed_groups=0.97)
    assert one(small, "Calibration moved 97 % of mixed groups").level == "note"
    large = said(drawn, order_mean_gap=0.0, mean_gap_after=0.4, deviation=0.1)
    assert "That is 4.0 deviations" in one(large, "Calibration moved").text
    assert one(large, "Calibration moved").level == "look"


@pytest.mark.parametrize(
    ("changes", "words", "level"),
    [
        ({"kept_share": 0.4}, "Balancing kept 40 %", "look"),
        ({"dropped": 1_234, "dropped_share": 0.2}, "1,234 rollouts (20 %) were lost", "act"),
        ({"dropped": 1, "dropped_share": 0.001}, "1 rollouts (0.1 %) were lost", "look"),
        ({"unknown": 9, "unknown_share": 0.2}, "9 rollouts (20 %) could not be graded", "look"),
        ({"masked_share": 0.02}, "2.0 % of tokens are masked", "look"),
        ({"truncated_share": 0.3}, "30 % of responses were cut", "look"),
        ({"repetition": 0.5}, "50 % of 4-grams repeat", "look"),
        ({"depth": [-0.1, -0.2, -0.2, -0.3]}, "from -0.100 in its first to -0.300", "note"),
    ],
)
def test_each_rule_says_its_number(drawn: Drawn, changes: dict, words: str, level: str) -> None:
    assert one(said(drawn, **changes), words).level == level


def test_a_healthy_domain_has_nothing_to_look_at(drawn: Drawn) -> None:
    healthy = {
        "order_auc": 0.8,
        "order_mean_gap": 0.2,
        "mean_gap_after": 0.3,
        "deviation": 0.2,
        "dropped": 0,
        "unknown": 0,
        "masked_share": 0.0,
        "truncated_share": 0.0,
        "repetition": 0.0,
        "depth": [-0.1] * 4,
    }
    assert {item.level for item in said(drawn, **healthy)} == {"fine", "note"}


def test_what_the_settings_mean_is_said_once(drawn: Drawn) -> None:
    def texts(**changes: object) -> list[Finding]:
        return findings(drawn.diagnosis, drawn.rollouts, drawn.config.model_copy(update=changes))

    assert one(texts(calibration=None), "There is no calibration").domain is None
    assert one(texts(calibration=CalibrationConfig(method="none")), "only reports").domain is None
    placebo = drawn.config.objective.model_copy(update={"placebo": True})
    assert one(texts(objective=placebo), "permuted outcomes").level == "note"
    masked = texts(calibration=CalibrationConfig(method="mask"))
    assert sum("margin mask" in item.text for item in masked) == 2  # both domains


def test_change_over_the_run_needs_two_errors(drawn: Drawn) -> None:
    base = replace(drawn.diagnosis.by_domain["math"], correct_error=0.05, correct_ratio=0.5)

    def change(**late: object) -> list[Finding]:
        diagnosis = replace(drawn.diagnosis, early={"math": base}, late={"math": replace(base, **late)})
        return findings(diagnosis, drawn.rollouts, drawn.config)

    assert one(change(correct_ratio=0.6), "correct ratio moved within its error").level == "note"  # 7.1 points
    assert one(change(correct_ratio=0.7), "correct ratio rose").level == "fine"
    assert one(change(correct_ratio=0.3), "correct ratio fell").level == "look"
    assert one(change(entropy=base.entropy / 3), "entropy fell").level == "look"
    assert one(change(length=base.length * 2), "mean length went").level == "look"
    assert not [item for item in change() if "AUC, which" in item.text]
    better = replace(base.order, auc=base.order.auc + 0.2)
    assert one(change(order=better), "AUC, which is taken before the shift").level == "note"


def test_the_most_pressing_comes_first(drawn: Drawn) -> None:
    levels = [item.level for item in findings(drawn.diagnosis, drawn.rollouts, drawn.config)]
    order = ["act", "look", "note", "fine"]
    assert levels == sorted(levels, key=order.index) and len(set(levels)) > 1


def test_loops_that_a_teacher_likes_are_named(drawn: Drawn) -> None:
    found = findings(drawn.diagnosis, drawn.rollouts, drawn.config)
    shown = [item for item in drawn.diagnosis.violations if drawn.rollouts.domain[item.wrong] == "math"]
    loops = sum(bool(drawn.rollouts.truncated[item.wrong]) for item in shown)
    assert np.mean([drawn.rollouts.repetition[item.wrong] > 0.5 for item in shown]) >= 1 / 3  # as it was drawn
    assert f"In {loops} of the {len(shown)} worst order violations" in one(found, "worst order violations").text
