"""What the shift does to the policy: P2 gradient, P4 its size, P5 fixed point, P6 label noise, P7 large delta.

Exact computations on small tabular policies, with torch autograd through the project's own loss.
"""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.advantage import token_weights
from megatron_opd.recipe.calibrate import calibrate, trajectory_return
from megatron_opd.recipe.policy_loss import policy_loss

BASELINES = {
    "lift": lambda rate: 0.0,
    "drop": lambda rate: 1.0,
    "spread": lambda rate: 0.5,
    "balanced": lambda rate: rate,
}
LENGTHS = [1, 2, 3, 5, 4, 2]
OUTCOMES = np.array([1, 1, 0, 0, 0, 1], np.int8)
GROUPS = np.array([0, 0, 0, 1, 1, 1])
VOCABULARY = 7


def rollouts(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """Parameters of a linear policy, features and ids of all tokens, and the teacher's advantage of each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    features = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    ids = torch.randint(VOCABULARY, (tokens,), generator=generator)
    gaps = 0.5 * torch.randn(tokens, generator=generator, dtype=torch.float64)
    parameters = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64, requires_grad=True)
    return parameters, features, ids, gaps.numpy()


def chosen_logprobs(parameters: torch.Tensor, features: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(features @ parameters, dim=1).gather(1, ids[:, None])[:, 0]


def loss_gradient(parameters, features, ids, advantages: np.ndarray) -> torch.Tensor:
    """Gradient of the project's loss at ratio 1, each sequence's tokens sharing a weight of 1."""
    logprobs = chosen_logprobs(parameters, features, ids)
    weights = np.concatenate([token_weights(np.ones(length, dtype=bool), "sequence") for length in LENGTHS])
    loss, _ = policy_loss(
        logprobs,
        logprobs.detach(),
        torch.from_numpy(advantages),
        torch.from_numpy(weights.astype(np.float64)),
        float(len(LENGTHS)),
        0.2,
        0.28,
    )
    return torch.autograd.grad(loss, parameters)[0]


@pytest.mark.parametrize("direction", list(BASELINES))
@pytest.mark.parametrize("margin", ["mean", "minmax"])
def test_p2_the_shift_adds_a_reinforce_term_whose_baseline_is_the_direction(direction: str, margin: str) -> None:
    parameters, features, ids, gaps = rollouts(seed=3)
    ends = np.cumsum(LENGTHS)[:-1]
    returns = np.array([trajectory_return(part, np.ones(len(part), dtype=bool)) for part in np.split(gaps, ends)])
    options = CalibrationConfig(margin=margin, direction=direction, delta=0.6)
    offsets = calibrate(returns, OUTCOMES, GROUPS, options).offsets
    shifted = loss_gradient(parameters, features, ids, gaps + np.repeat(offsets, LENGTHS))

    # By hand: - 1/B sum_i s(q_i) (R_i - b_i) 1/|tau_i| sum_t grad log pi, from the definition of s.
    term = torch.zeros_like(parameters)
    logprobs = chosen_logprobs(parameters, features, ids).split(LENGTHS)
    for group in (0, 1):
        own = np.flatnonzero(GROUPS == group)
        good, bad = ([returns[i] for i in own if OUTCOMES[i] == outcome] for outcome in (1, 0))
        gap = np.mean(good) - np.mean(bad) if margin == "mean" else min(good) - max(bad)
        shift, baseline = max(0.0, 0.6 - gap), BASELINES[direction](len(good) / len(own))
        for i in own:
            score = torch.autograd.grad(logprobs[i].mean(), parameters, retain_graph=True)[0]
            term -= shift * (int(OUTCOMES[i]) - baseline) * score / len(LENGTHS)
    assert term.abs().max() > 1e-3
    plain = loss_gradient(parameters, features, ids, gaps)
    assert torch.allclose(shifted, plain + term, rtol=0, atol=1e-7)  # the weights are float32


@pytest.mark.parametrize("direction", list(BASELINES))
def test_p4_the_gradient_moves_by_at_most_shift_times_baseline_distance_times_score(direction: str) -> None:
    parameters, features, ids, gaps = rollouts(seed=5)
    parts = np.split(gaps, np.cumsum(LENGTHS)[:-1])
    returns = np.array([part.mean() for part in parts])
    options = CalibrationConfig(direction=direction, delta=0.6)
    offsets = calibrate(returns, OUTCOMES, GROUPS, options).offsets
    change = loss_gradient(parameters, features, ids, gaps + np.repeat(offsets, LENGTHS))
    change -= loss_gradient(parameters, features, ids, gaps)
    logprobs = chosen_logprobs(parameters, features, ids).split(LENGTHS)
    scores = [torch.autograd.grad(part.mean(), parameters, retain_graph=True)[0].norm() for part in logprobs]
    assert change.norm() <= np.abs(offsets).mean() * float(max(scores)) + 1e-6


class Tree:
    """All binary sequences of a length: a random teacher, a random set of correct ones, fixed points by recursion."""

    def __init__(self, length: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.length = length
        self.prefixes = [h for size in range(length) for h in product((0, 1), repeat=size)]
        self.teacher = {h: rng.dirichlet([3.0, 3.0]) for h in self.prefixes}
        self.correct = {leaf: float(rng.random() < 0.5) for leaf in product((0, 1), repeat=length)}

    def pass_values(self, policy: dict) -> dict:
        """Probability of ending correct from each prefix."""
        value = dict(self.correct)
        for h in reversed(self.prefixes):
            value[h] = policy[h] @ [value[(*h, 0)], value[(*h, 1)]]
        return value

    def fixed_point(self, shift: float) -> dict:
        """pi(o|h) proportional to teacher(o|h) exp(shift Q(h, o)), Q under pi itself: one backward pass."""
        value, policy = dict(self.correct), {}
        for h in reversed(self.prefixes):
            tilted = self.teacher[h] * np.exp(shift * np.array([value[(*h, 0)], value[(*h, 1)]]))
            policy[h] = tilted / tilted.sum()
            value[h] = policy[h] @ [value[(*h, 0)], value[(*h, 1)]]
        return policy

    def leaf(self, policy: dict, leaf: tuple) -> float:
        return float(np.prod([policy[leaf[:t]][leaf[t]] for t in range(self.length)]))

    def gradient(self, policy: dict, shift: float, baseline: float) -> float:
        """Largest entry of the expected gradient by the logits, token coefficient r_t + shift (R - baseline)."""
        largest, grad = 0.0, {h: np.zeros(2) for h in self.prefixes}
        for leaf, right in self.correct.items():
            chance = self.leaf(policy, leaf)
            for t, o in enumerate(leaf):
                h = leaf[:t]
                coefficient = np.log(self.teacher[h][o] / policy[h][o]) + shift * (right - baseline)
                grad[h] += chance / self.length * coefficient * (np.eye(2)[o] - policy[h])
        for entry in grad.values():
            largest = max(largest, float(np.abs(entry).max()))
        return largest


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_p5_the_fixed_point_tilts_the_teacher_by_the_pass_probability(seed: int) -> None:
    tree, shift = Tree(8, seed), 0.4
    point = tree.fixed_point(shift)
    for baseline in (0.0, 0.5, 1.0):
        assert tree.gradient(point, shift, baseline) < 1e-14
    assert tree.gradient(tree.teacher, shift, 0.5) > 1e-3  # the teacher is not stationary for delta > 0
    assert tree.gradient(tree.teacher, 0.0, 0.5) == 0.0  # it is for delta = 0

    before, after = tree.pass_values(tree.teacher)[()], tree.pass_values(point)[()]
    odds = (after / (1 - after)) / (before / (1 - before))
    assert odds == pytest.approx(np.exp(shift), rel=0.03)  # and not exp(length * shift) = 24.5

    # Raw margin there, in expectation: about -shift / length, so the shift does not fade as training goes on.
    chance = {leaf: tree.leaf(point, leaf) for leaf in tree.correct}
    mean_gap = {leaf: np.log(tree.leaf(tree.teacher, leaf) / chance[leaf]) / tree.length for leaf in tree.correct}
    good, bad = (
        sum(chance[x] * mean_gap[x] for x in chance if tree.correct[x] == r)
        / sum(chance[x] for x in chance if tree.correct[x] == r)
        for r in (1.0, 0.0)
    )
    assert good - bad == pytest.approx(-shift / tree.length, rel=0.15)


@pytest.mark.parametrize("direction", ["lift", "drop", "spread", "balanced"])
@pytest.mark.parametrize(("margin", "delta", "sure"), [("mean", 0.4, 5.0), ("minmax", 0.4, 1.0), ("mean", 6.0, 5.0)])
def test_p8_a_confident_teacher_is_overcome_only_by_a_delta_as_large_as_it_is_sure(
    direction: str, margin: str, delta: float, sure: float
) -> None:
    length, own = 20, -1.5  # the student's log-odds of the wrong token, moved by exact gradients
    teacher = np.array([-np.log1p(np.exp(sure)), -np.log1p(np.exp(-sure))])  # log-probs of the right, the wrong token
    outcomes, groups = np.array([1, 0], np.int8), np.zeros(2, np.int64)
    options = CalibrationConfig(margin=margin, direction=direction, delta=delta)
    for _ in range(80):
        student = np.array([-np.log1p(np.exp(own)), -np.log1p(np.exp(-own))])
        gaps = teacher - student
        result = calibrate(gaps / length, outcomes, groups, options)
        assert result.report.margin_before == pytest.approx(-(sure - own) / length, abs=1e-9)
        right, wrong = gaps + result.offsets
        own += 0.5 * (wrong - right)  # its sign is that of the gradient; the size only sets the pace
    assert own == pytest.approx(sure - delta * length / (length - 1), abs=1e-6)
    assert (own < 0) == (delta > sure * (length - 1) / length)


def test_p6_symmetric_label_noise_scales_the_outcome_term_and_moves_the_baseline() -> None:
    flips, shift, baseline = 0.2, 0.4, 0.3
    for right in (0.0, 1.0):
        noisy = (1 - flips) * shift * (right - baseline) + flips * shift * (1 - right - baseline)
        stated = (1 - 2 * flips) * shift * (right - baseline) + shift * flips * (1 - 2 * baseline)
        assert noisy == pytest.approx(stated)


def test_p7_with_a_large_delta_every_group_gets_nearly_the_same_outcome_reward() -> None:
    """Published statistics of one setting: mean gap 0.011, 45 % of pairs inverted, which for normals is sigma 0.062."""
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(1000), 16)
    outcomes = np.tile([1, 0], 8000).astype(np.int8)
    returns = rng.normal(-0.324, 0.062, size=16000) + 0.011 * outcomes
    ordered = {}
    for delta in (0.1, 0.2, 0.4):
        result = calibrate(returns, outcomes, groups, CalibrationConfig(delta=delta))
        after = calibrate(returns + result.offsets, outcomes, groups, CalibrationConfig(method="none", margin="minmax"))
        ordered[delta] = after.report.consistent_before
        assert result.report.changed_groups > 0.99
    assert ordered[0.1] < 0.05 and 0.65 < ordered[0.2] < 0.85 and ordered[0.4] > 0.999
    sizes = np.abs(result.offsets)  # those of 0.4
    assert sizes.mean() == pytest.approx(0.195, abs=0.002) and sizes.std() / sizes.mean() < 0.1
    few = calibrate(returns, outcomes, groups, CalibrationConfig(delta=0.0)).report.changed_groups
    assert 0.2 < few < 0.5


def test_p7_in_units_of_sigma_no_mean_margin_exceeds_the_cauchy_bound() -> None:
    # A share p of correct ones: margin <= sigma / sqrt(p (1 - p)), reached when each side is constant.
    returns, outcomes = np.array([1.0, 0.0, 0.0, 0.0]), np.array([1, 0, 0, 0], np.int8)
    bound = 1 / np.sqrt(0.25 * 0.75)
    groups = np.zeros(4, np.int64)
    at, above = (CalibrationConfig(delta=bound * factor, delta_unit="sigma") for factor in (1.0, 1.01))
    assert not calibrate(returns, outcomes, groups, at).offsets.any()
    assert calibrate(returns, outcomes, groups, above).offsets.all()


def test_the_baseline_is_not_free_when_lengths_vary_under_sequence_weights() -> None:
    """E[(1/|tau|) grad log pi(tau)] = grad E[1/|tau|]: not 0 as soon as the policy decides when to stop."""
    logit = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    stop = torch.sigmoid(logit)
    chances = [stop, (1 - stop) * stop, (1 - stop) ** 2]  # stops after 1, 2 or at most 3 tokens
    mean_inverse = sum(chance / length for length, chance in enumerate(chances, start=1))
    expected = torch.autograd.grad(mean_inverse, logit, retain_graph=True)[0]
    score = sum(
        chance.detach() / length * torch.autograd.grad(chance.log(), logit, retain_graph=True)[0]
        for length, chance in enumerate(chances, start=1)
    )
    assert score == pytest.approx(expected.item()) and expected > 0.05
