"""Difficulty balancing: nothing is deleted, totals are exact, shapes are told apart at every scale."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.errors import ConfigError, DataError
from megatron_opd.recipe.difficulty import (
    BetaPosterior,
    detect_shape,
    pass_histogram,
    repeats,
    target_histogram,
    upsample_range,
)

SHAPES = ("U", "J", "mirrored_J", "flat")
histograms = st.lists(st.integers(0, 500), min_size=2, max_size=17).map(np.array)


@st.composite
def graded_prompts(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    samples = draw(st.integers(1, 9))
    return np.array(draw(st.lists(st.integers(0, samples), max_size=60)), dtype=np.int64), samples


def slow_shape(counts: list[int]) -> str:
    """The documented rule, clause by clause."""
    if len(counts) < 3:
        return "flat"
    middle = sum(counts[1:-1]) / (len(counts) - 2)
    hard, easy = (counts[end] if counts[end] > 0 and counts[end] >= 2 * middle else 0 for end in (0, -1))
    if hard and easy and hard < 4 * easy and easy < 4 * hard:
        return "U"
    if hard and hard >= 4 * easy:
        return "mirrored_J"
    return "J" if easy else "flat"


# Histogram and shape


@given(graded_prompts())
def test_the_histogram_counts_prompts(prompts) -> None:
    passes, samples = prompts
    counts = pass_histogram(passes, samples)
    assert counts.tolist() == [passes.tolist().count(c) for c in range(samples + 1)]


@pytest.mark.parametrize(
    ("passes", "samples"),
    [
        (np.array([9]), 8),
        (np.array([-1]), 8),
        (np.array([0.5]), 8),
        (np.array([True]), 8),
        (np.array([[1]]), 8),
        ([1], 8),
        (np.array([0]), 0),
    ],
)
def test_passes_of_another_type_or_range_are_errors(passes, samples) -> None:
    with pytest.raises(DataError):
        pass_histogram(passes, samples)


@pytest.mark.parametrize(
    ("counts", "shape"),
    [
        ([400, 60, 50, 40, 40, 40, 50, 60, 300], "U"),
        ([500, 120, 80, 60, 50, 40, 40, 30, 30], "mirrored_J"),
        ([30, 30, 40, 40, 50, 60, 80, 120, 500], "J"),
        ([600, 43, 43, 43, 43, 43, 43, 43, 100], "mirrored_J"),  # a small rise at the far end is no second arm
        ([100, 100, 100, 100, 100, 100, 100, 100, 100], "flat"),
        ([10, 50, 90, 120, 130, 120, 90, 50, 10], "flat"),
        ([150, 100, 100, 100, 100], "flat"),
        ([200, 100, 100, 100, 100], "mirrored_J"),
        ([7, 0, 0], "mirrored_J"),
        ([0, 0, 7], "J"),
        ([7, 0, 7], "U"),
        ([0, 7, 0], "flat"),
        ([0, 0, 0], "flat"),
        ([9, 1], "flat"),
    ],
)
def test_shapes(counts: list[int], shape: str) -> None:
    assert detect_shape(np.array(counts)) == shape


@given(histograms, st.integers(1, 10**6))
def test_the_shape_follows_its_rule_at_every_scale(counts, scale) -> None:
    shape = detect_shape(counts)
    assert shape == slow_shape(counts.tolist())
    assert detect_shape(counts * scale) == shape and detect_shape(counts / 2**20) == shape


@given(histograms)
def test_reversing_the_histogram_exchanges_the_two_js(counts) -> None:
    mirror = {"U": "U", "flat": "flat", "J": "mirrored_J", "mirrored_J": "J"}
    assert detect_shape(counts[::-1]) == mirror[detect_shape(counts)]


@pytest.mark.parametrize("samples", [2, 4, 8, 16, 64])
def test_uniform_pass_rates_are_flat_for_every_number_of_samples(samples: int) -> None:
    assert detect_shape(np.full(samples + 1, 10)) == "flat"


def test_ranges_of_the_paper_and_of_this_project() -> None:
    assert list(upsample_range("U", 8)) == [1, 2, 3, 4, 5, 6, 7]
    assert list(upsample_range("mirrored_J", 8)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(upsample_range("J", 8)) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert list(upsample_range("flat", 8)) == [] == list(upsample_range("U", 1))
    with pytest.raises(ConfigError) as caught:
        upsample_range("L", 8)
    assert caught.value.got == "L" and "mirrored_J" in str(caught.value.expected)


# Targets and repeats


def test_levels() -> None:
    counts = np.array([40, 3, 10, 5, 21])
    assert target_histogram(counts, upsample_range("U", 4), "largest").tolist() == [40, 10, 10, 10, 21]
    assert target_histogram(counts, upsample_range("U", 4), "ends").tolist() == [40, 31, 31, 31, 21]  # 30.5 rounds up
    assert target_histogram(counts, upsample_range("mirrored_J", 4), "ends").tolist() == [40] * 5
    assert target_histogram(counts, upsample_range("J", 4), "ends").tolist() == [40, 21, 21, 21, 21]
    assert target_histogram(counts, upsample_range("flat", 4), "ends").tolist() == counts.tolist()
    for raised, level in ((range(5), "ends"), (range(1, 4), "level")):
        with pytest.raises(ConfigError):
            target_histogram(counts, raised, level)


@given(histograms, st.sampled_from(SHAPES), st.sampled_from(["largest", "ends"]))
def test_a_target_never_lowers_a_bin_and_leaves_the_others(counts, shape, level) -> None:
    raised = upsample_range(shape, len(counts) - 1)
    target = target_histogram(counts, raised, level)
    assert (target >= counts).all()
    assert all(target[c] == counts[c] for c in range(len(counts)) if c not in raised)
    if level == "largest" and len(raised):
        assert len(set(target[list(raised)].tolist())) == 1


def slow_total(prompts: int, target: int, cap: int) -> int:
    return max(prompts, min(target, prompts * cap))


@settings(deadline=None)
@given(graded_prompts(), st.data(), st.integers(1, 6), st.integers(0, 3))
def test_repeats_delete_nothing_keep_the_cap_and_meet_the_totals(prompts, data, cap, seed) -> None:
    passes, samples = prompts
    wanted = st.lists(st.integers(0, 300), min_size=samples + 1, max_size=samples + 1)
    target = np.array(data.draw(wanted), dtype=np.int64)
    result = repeats(passes, samples, target, cap, seed)
    assert result.shape == passes.shape and result.dtype == np.int64
    assert ((result >= 1) & (result <= cap)).all()
    for c in range(samples + 1):
        own = result[passes == c]
        assert own.sum() == slow_total(len(own), int(target[c]), cap)
        assert len(own) == 0 or own.max() - own.min() <= 1
    assert result.tolist() == repeats(passes, samples, target, cap, seed).tolist()


def test_the_ends_are_never_deleted() -> None:
    """The paper's figure 3: dropping all-correct or all-wrong prompts does worse than leaving everything in."""
    passes = np.repeat(np.arange(9), [400, 60, 50, 40, 40, 40, 50, 60, 300])
    counts = pass_histogram(passes, 8)
    target = target_histogram(counts, upsample_range(detect_shape(counts), 8), "ends")
    after = np.bincount(passes, repeats(passes, 8, target, 5), 9)
    assert after.tolist() == [400, 300, 250, 200, 200, 200, 250, 300, 300]  # 350 is wanted, 5 repeats are the cap


def test_the_seed_draws_who_gets_one_more() -> None:
    passes, target = np.ones(200, np.int64), np.array([0, 300, 0])
    drawn = {seed: repeats(passes, 2, target, 4, seed) for seed in range(3)}
    assert len({result.tobytes() for result in drawn.values()}) == 3
    assert all(result.sum() == 300 for result in drawn.values())
    assert 20 < drawn[0][:100].sum() - 100 < 80  # not the first of the file


def test_repeats_refuse_what_does_not_fit() -> None:
    passes = np.array([0, 1])
    with pytest.raises(ConfigError):
        repeats(passes, 1, np.array([1, 1]), 0)
    for target in (np.array([1]), np.array([1.0, 1.0]), [1, 1]):
        with pytest.raises(DataError, match="target"):
            repeats(passes, 1, target, 2)


# Posterior


rollouts = st.lists(
    st.integers(0, 9).flatmap(lambda n: st.tuples(st.integers(0, 4), st.integers(0, n), st.just(n))), max_size=30
)


@settings(deadline=None)
@given(rollouts, st.integers(0, 30), st.floats(0.1, 5.0), st.floats(0.1, 5.0))
def test_updates_match_a_loop_and_do_not_depend_on_how_they_are_cut(drawn, cut, prior_alpha, prior_beta) -> None:
    posterior = BetaPosterior(5, prior_alpha, prior_beta)
    for part in (drawn[:cut], drawn[cut:]):
        posterior.update(*(np.array([row[side] for row in part], dtype=np.int64) for side in range(3)))
    for prompt in range(5):
        passed = sum(passes for index, passes, _ in drawn if index == prompt)
        failed = sum(graded - passes for index, passes, graded in drawn if index == prompt)
        assert posterior.alpha[prompt] == pytest.approx(prior_alpha + passed)
        assert posterior.beta[prompt] == pytest.approx(prior_beta + failed)
        expected = (prior_alpha + passed) / (prior_alpha + prior_beta + passed + failed)
        assert posterior.mean()[prompt] == pytest.approx(expected)


def test_item_8_unknown_outcomes_move_no_pass_rate() -> None:
    """A verifier that was down for all 16 rollouts, or for 12 of them."""
    posterior = BetaPosterior(2)
    posterior.update(np.array([0, 1]), np.array([0, 2]), np.array([0, 4]))
    assert posterior.mean().tolist() == [0.5, 0.5]


def slow_weight(alpha: float, beta: float, a: float, b: float) -> float:
    """E[p^a (1-p)^b] by the midpoint rule; for parameters >= 1, where the density has no pole."""
    points = (np.arange(20000) + 0.5) / 20000
    density = points ** (alpha - 1) * (1 - points) ** (beta - 1)
    return float((points**a * (1 - points) ** b * density).sum() / density.sum())


@settings(deadline=None, max_examples=40)
@given(st.floats(1.0, 40.0), st.floats(1.0, 40.0), st.floats(0.0, 3.0), st.floats(0.0, 3.0))
def test_weights_are_the_expectation_under_the_posterior(alpha, beta, a, b) -> None:
    assert BetaPosterior(1, alpha, beta).weights((a, b))[0] == pytest.approx(slow_weight(alpha, beta, a, b), rel=1e-3)


def test_weights_favour_the_frontier_and_never_vanish() -> None:
    posterior = BetaPosterior(4)
    posterior.update(np.array([0, 1, 2]), np.array([0, 8, 16]), np.array([16, 16, 16]))
    never, half, always, unseen = posterior.weights()
    assert never == pytest.approx(always) and 0 < never < unseen < half < 0.25
    assert never == pytest.approx(1 * 17 / (18 * 19)) and unseen == pytest.approx(1 / 6)
    assert posterior.weights((0.0, 0.0)).tolist() == pytest.approx([1.0] * 4)


def test_with_evidence_the_weight_becomes_the_one_of_paced() -> None:
    posterior = BetaPosterior(1)
    posterior.update(np.array([0]), np.array([250_000]), np.array([1_000_000]))
    assert posterior.weights((2.0, 1.0))[0] == pytest.approx(0.25**2 * 0.75, rel=1e-4)


def test_a_checkpoint_continues_the_posterior_and_shares_no_memory() -> None:
    first, second = BetaPosterior(3), BetaPosterior(3)
    first.update(np.array([0, 0, 2]), np.array([1, 2, 0]), np.array([4, 4, 1]))
    state = first.state_dict()
    second.load_state_dict(state)
    for posterior in (first, second):
        posterior.update(np.array([1]), np.array([1]), np.array([1]))
    assert first.alpha.tolist() == second.alpha.tolist() == [4.0, 2.0, 1.0]
    assert first.beta.tolist() == second.beta.tolist() == [6.0, 1.0, 2.0]
    assert state["alpha"].tolist() == [4.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "rows",
    [([5], [0], [1]), ([-1], [0], [1]), ([0], [2], [1]), ([0], [-1], [1]), ([0, 1], [1], [1]), ([0], [0.5], [1])],
)
def test_a_bad_update_is_an_error_and_changes_nothing(rows) -> None:
    posterior = BetaPosterior(3)
    with pytest.raises(DataError):
        posterior.update(*(np.array(row) for row in rows))
    assert posterior.mean().tolist() == [0.5] * 3


def test_states_priors_and_powers_that_do_not_fit_are_errors() -> None:
    posterior = BetaPosterior(2)
    good = np.ones(2)
    for state in (
        {"alpha": good},
        {"alpha": np.ones(3), "beta": good},
        {"alpha": good, "beta": np.array([1.0, math.nan])},
    ):
        with pytest.raises(DataError, match="saved pass rates"):
            posterior.load_state_dict(state)
    for prior in ((0.0, 1.0), (1.0, math.inf), (math.nan, 1.0)):
        with pytest.raises(ConfigError, match="prior"):
            BetaPosterior(2, *prior)
    for power in ((-1.0, 1.0), (1.0, math.nan)):
        with pytest.raises(ConfigError, match="powers"):
            posterior.weights(power)
    assert len(BetaPosterior(0).weights()) == 0
