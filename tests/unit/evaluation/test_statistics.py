"""The statistics against slow formulas and against enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from megatron_opd.evaluation import statistics
from megatron_opd.evaluation.statistics import difference, estimate, pass_at


@pytest.mark.parametrize("responses", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(responses: int) -> None:
    for correct, k in itertools.product(range(responses + 1), range(1, responses + 1)):
        outcomes = [1] * correct + [0] * (responses - correct)
        subsets = list(itertools.combinations(outcomes, k))
        assert pass_at(k, responses, correct) == pytest.approx(sum(map(max, subsets)) / len(subsets)), (correct, k)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over all ways in which 6 responses can come out is the probability for k = 2 with p = 0.3."""
    p, responses, k = 0.3, 6, 2
    chances = [math.comb(responses, c) * p**c * (1 - p) ** (responses - c) for c in range(responses + 1)]
    mean = sum(chance * pass_at(k, responses, c) for c, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_1_is_the_accuracy_and_large_counts_are_exact() -> None:
    assert [pass_at(1, 32, c) for c in (0, 8, 32)] == [0.0, 0.25, 1.0]
    assert pass_at(512, 1024, 1) == pytest.approx(0.5) and pass_at(512, 1024, 600) == 1.0


def test_the_standard_error_is_clustered_by_problem() -> None:
    """The sum over clusters of squared sums of residuals, with the correction m / (m - 1) for few clusters."""
    outcomes = np.random.default_rng(1).integers(2, size=(9, 5)).astype(float)
    residuals = outcomes - outcomes.mean()
    clustered = math.sqrt((residuals.sum(axis=1) ** 2).sum() * 9 / 8) / outcomes.size
    found = estimate(outcomes.mean(axis=1), seed=0)
    assert found.standard_error == pytest.approx(clustered) and found.value == pytest.approx(outcomes.mean())
    alike = np.repeat([[0.0], [1.0]], 16, axis=1)  # responses that tell nothing new
    assert estimate(alike.mean(axis=1), 0).standard_error == pytest.approx(0.5)


def test_the_interval_is_that_of_all_resamples() -> None:
    values = [0.0, 0.25, 0.5, 1.0, 0.1]
    means = [np.mean(chosen) for chosen in itertools.product(values, repeat=5)]
    found = estimate(values, seed=3)
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=0.011)
    assert (found.low, found.high) == (estimate(values, 3).low, estimate(values, 3).high)
    assert found.low < found.value < found.high


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(5)
    hits = 0
    for trial in range(200):
        found = estimate(generator.binomial(8, 0.4, size=60) / 8, seed=trial)
        hits += found.low <= 0.4 <= found.high
    assert 0.90 <= hits / 200 <= 0.99


def test_few_problems() -> None:
    assert estimate([], 0) is None and difference([], [], 0) is None
    one = estimate([0.5], 0)
    assert (one.value, one.standard_error, one.low, one.high) == (0.5, None, 0.5, 0.5)


def slow_p_value(gaps: list[float]) -> float:
    signs = list(itertools.product((-1, 1), repeat=len(gaps)))
    sums = [abs(sum(sign * gap for sign, gap in zip(row, gaps, strict=True))) for row in signs]
    return sum(total >= abs(sum(gaps)) - 1e-9 for total in sums) / len(sums)


@pytest.mark.parametrize("gaps", [[0.1, 0.2, -0.3, 0.4, 0.0], [1, 1, 1, 1, 1, 1], [0.3], [0.1, 0.2, -0.3]])
def test_the_p_value_is_that_of_all_sign_changes(gaps: list[float]) -> None:
    found = difference([0.0] * len(gaps), gaps, seed=0)
    assert found.exact and found.p_value == pytest.approx(slow_p_value(gaps))
    assert found.estimate.value == pytest.approx(np.mean(gaps))
    assert (found.better, found.worse) == (sum(gap > 0 for gap in gaps), sum(gap < 0 for gap in gaps))
    mirrored = difference(gaps, [0.0] * len(gaps), seed=0)
    assert mirrored.p_value == found.p_value and (mirrored.better, mirrored.worse) == (found.worse, found.better)


def test_equal_models_differ_by_chance_alone() -> None:
    found = difference([0.5, 1.0], [0.5, 1.0], seed=0)
    assert (found.p_value, found.exact, found.estimate.low, found.estimate.high) == (1.0, True, 0.0, 0.0)


def test_many_problems_are_sampled_and_agree_with_enumeration(monkeypatch: pytest.MonkeyPatch) -> None:
    gaps = np.random.default_rng(2).normal(0.25, 0.5, size=14)
    exact = difference([0.0] * 14, gaps, seed=0)
    monkeypatch.setattr(statistics, "MOST_ENUMERATED", 5)
    sampled = difference([0.0] * 14, gaps, seed=0)
    assert exact.exact and not sampled.exact and 0.005 < exact.p_value < 0.5
    assert sampled.p_value == pytest.approx(exact.p_value, abs=0.005)
