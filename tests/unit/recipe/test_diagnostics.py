"""Metrics of a step against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from rollouts import recipe, rollout, scored

from megatron_opd.recipe.diagnostics import step_diagnostics
from megatron_opd.recipe.objective import step_objective
from megatron_opd.records import Scored, Verified


def metrics(items: list[Scored], unscored: list[Verified] = [], *overrides: str) -> dict[str, float]:  # noqa: B006
    objective = step_objective(items, np.ones(len(items), dtype=bool), recipe(*overrides), 0)
    return step_diagnostics(objective.rollouts, unscored, [])


def test_means_are_over_tokens_and_unknown_outcomes_are_not_graded() -> None:
    items = [
        scored([-1.0, -2.0], [-0.5, -1.5]),
        scored([-1.0], [-21.0], outcome=-1, finish="length"),
        scored([-0.5], [-1.0], outcome=0, domain="code", group=1),
    ]
    found = metrics(items)
    assert found["opd/gap"] == pytest.approx((0.5 + 0.5 - 20.0 - 0.5) / 4)
    assert found["opd/abs_gap"] == pytest.approx(21.5 / 4)
    assert found["opd/masked"] == pytest.approx(0.25)
    assert found["rollout/length"] == pytest.approx(4 / 3)
    assert found["rollout/truncated"] == pytest.approx(1 / 3)
    assert found["rollout/entropy"] == pytest.approx(4.5 / 4)
    assert found["reward/correct"] == pytest.approx(0.5)
    assert found["reward/unknown"] == pytest.approx(1 / 3)
    assert found["reward/correct/math"] == 1.0 and found["reward/correct/code"] == 0.0
    assert found["opd/gap/code"] == pytest.approx(-0.5)
    assert found["balance/kept"] == 1.0 and found["calibration/trained"] == 1.0


def test_the_order_is_that_before_the_shift() -> None:
    reversed_group = [scored([-1.0], [-1.8]), scored([-1.0], [-1.2], outcome=0), scored([-1.0], [-1.0], outcome=0)]
    right = [scored([-1.0], [-0.5], group=1), scored([-1.0], [-1.5], outcome=0, group=1)]
    found = metrics([*reversed_group, *right], [], "conf/recipe/uni_opd_text.yaml")
    assert found["order/auc"] == pytest.approx((0 + 1) / 3) and found["order/consistency"] == 0.5
    assert found["order/mean_gap"] == pytest.approx(((-0.8 + 0.1) + (0.5 + 0.5)) / 2)
    assert found["order/mixed"] == 1.0 and found["calibration/shifted"] == pytest.approx(3 / 5)
    assert found["calibration/mean_shift"] == pytest.approx(3 * (0.4 + 0.7) / 2 / 5)


def test_rollouts_that_were_never_scored_count_where_they_belong() -> None:
    found = metrics([scored([-1.0], [-1.0])], [rollout([-1.0] * 3, outcome=0), rollout([-1.0] * 2, outcome=-1)])
    assert found["reward/correct"] == 0.5 and found["rollout/length"] == 2.0
    assert found["balance/kept"] == pytest.approx(1 / 3) and found["opd/gap"] == 0.0


def test_a_failed_teacher_call_is_not_balancing() -> None:
    objective = step_objective([scored([-1.0], [-1.0])], np.ones(1, dtype=bool), recipe(), 0)
    found = step_diagnostics(objective.rollouts, [rollout([-1.0])], [rollout([-1.0]), rollout([-1.0])])
    assert found["balance/kept"] == 0.75


def test_a_share_of_nothing_is_left_out_and_nothing_scored_has_only_what_is_known() -> None:
    assert "reward/correct" not in metrics([scored([-1.0], [-1.0], outcome=-1)])
    one_sided = metrics([scored([-1.0], [-1.0]), scored([-1.0], [-2.0])])
    assert not {"order/auc", "order/consistency", "order/mean_gap", "opd/topk_overlap"} & set(one_sided)
    assert one_sided["order/mixed"] == 0.0
    assert set(metrics([], [rollout([-1.0])])) >= {"reward/correct", "rollout/length"}
    assert metrics([]) == {}
