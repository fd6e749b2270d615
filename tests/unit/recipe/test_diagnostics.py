"""Metrics of a step against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_opd.recipe.diagnostics import rollout_metrics
from megatron_opd.records import Outcome, Prompt, Rollout, Scored, Verified


def scored(domain: str, outcome: Outcome, student: list[float], teacher: list[float], finish: str = "stop") -> Scored:
    prompt = Prompt("p", domain, "?", (5,), "1")
    ids, versions = np.arange(len(student)), np.zeros(len(student), np.int64)
    rollout = Rollout(prompt, 0, ids, np.array(student, np.float32), versions, finish, "")
    return Scored(Verified(rollout, outcome, ""), domain, np.array(teacher, np.float32))


def test_means_are_over_tokens_and_unknown_outcomes_are_not_graded() -> None:
    rollouts = [
        scored("math", Outcome.CORRECT, [-1.0, -2.0], [-0.5, -1.5]),
        scored("math", Outcome.UNKNOWN, [-1.0], [-21.0], finish="length"),
        scored("code", Outcome.INCORRECT, [-0.5], [-1.0]),
    ]
    metrics = rollout_metrics(rollouts, max_gap=10.0)
    assert metrics["opd/gap"] == pytest.approx((0.5 + 0.5 - 20.0 - 0.5) / 4)
    assert metrics["opd/abs_gap"] == pytest.approx(21.5 / 4)
    assert metrics["opd/masked"] == pytest.approx(0.25)
    assert metrics["rollout/length"] == pytest.approx(4 / 3)
    assert metrics["rollout/truncated"] == pytest.approx(1 / 3)
    assert metrics["rollout/entropy"] == pytest.approx(4.5 / 4)
    assert metrics["reward/correct"] == pytest.approx(0.5)
    assert metrics["reward/correct/math"] == 1.0 and metrics["reward/correct/code"] == 0.0
    assert metrics["opd/gap/code"] == pytest.approx(-0.5)


def test_nothing_graded_has_no_share_and_nothing_scored_has_no_metrics() -> None:
    assert "reward/correct" not in rollout_metrics([scored("math", Outcome.UNKNOWN, [-1.0], [-1.0])], 10.0)
    assert rollout_metrics([], 10.0) == {}
