"""Losses on packed tokens against slow formulas, case by case."""

from __future__ import annotations

import math
from collections.abc import Iterable

import pytest
import torch

from megatron_opd.recipe.policy_loss import forward_kl_loss, policy_loss

LOW, HIGH = 0.2, 0.28


def slow(logprob: float, behaviour: float, advantage: float) -> tuple[float, float, bool]:
    """Loss of one token, its derivative by ``logprob``, and whether clipping took the derivative away."""
    ratio = math.exp(logprob - behaviour)
    if advantage > 0 and ratio > 1 + HIGH:
        return -(1 + HIGH) * advantage, 0.0, True
    if advantage < 0 and ratio < 1 - LOW:
        return -(1 - LOW) * advantage, 0.0, True
    return -ratio * advantage, -ratio * advantage, False


# Ratio below, between and above the bounds, with either sign of the advantage.
CASES = [(change, advantage) for change in (-0.9, -0.1, 0.0, 0.2, 0.9) for advantage in (-1.5, 0.7)]


@pytest.mark.parametrize(("change", "advantage"), CASES)
def test_one_token(change: float, advantage: float) -> None:
    logprobs = torch.tensor([-1.0 + change], requires_grad=True)
    loss, metrics = policy_loss(
        logprobs, torch.tensor([-1.0]), torch.tensor([advantage]), torch.tensor([1.0]), 1.0, LOW, HIGH
    )
    loss.backward()
    value, derivative, clipped = slow(-1.0 + change, -1.0, advantage)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert logprobs.grad.item() == pytest.approx(derivative, rel=1e-5)
    assert metrics["clipped_share"].item() == clipped


def test_a_step_down_the_gradient_follows_the_advantage() -> None:
    logprobs = torch.tensor([-1.0, -1.0], requires_grad=True)
    loss, _ = policy_loss(logprobs, logprobs.detach(), torch.tensor([0.5, -0.5]), torch.ones(2), 2.0, LOW, HIGH)
    loss.backward()
    assert (-logprobs.grad).sign().tolist() == [1.0, -1.0]


def random_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(40, generator=generator)
    return {
        "logprobs": logprobs,
        "behaviour_logprobs": logprobs + torch.randn(40, generator=generator) * 0.4,
        "advantages": torch.randn(40, generator=generator),
        "weights": torch.rand(40, generator=generator) * (torch.rand(40, generator=generator) > 0.3),
    }


def test_weighted_sum_and_metrics() -> None:
    batch = random_batch()
    loss, metrics = policy_loss(**batch, denominator=7.0, clip_low=LOW, clip_high=HIGH)
    tokens = list(zip(*(batch[name].tolist() for name in batch), strict=True))
    shares = [weight / 7.0 for _, _, _, weight in tokens]
    losses = [slow(logprob, old, advantage) for logprob, old, advantage, _ in tokens]

    def mean(values: Iterable[float]) -> float:
        return sum(share * value for share, value in zip(shares, values, strict=True))

    assert loss.item() == pytest.approx(mean(value for value, _, _ in losses), rel=1e-5)
    expected = {
        "advantage": mean(advantage for _, _, advantage, _ in tokens),
        "abs_advantage": mean(abs(advantage) for _, _, advantage, _ in tokens),
        "clipped_share": mean(clipped for _, _, clipped in losses),
        "abs_logprob_change": mean(abs(logprob - old) for logprob, old, _, _ in tokens),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-5)


def test_splits_add_up() -> None:
    batch = random_batch()
    options = {"denominator": 7.0, "clip_low": LOW, "clip_high": HIGH}
    whole, whole_metrics = policy_loss(**batch, **options)
    parts = []
    for part in (slice(0, 11), slice(11, 40)):
        parts.append(policy_loss(**{name: value[part] for name, value in batch.items()}, **options))
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, metrics in parts), value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_never_read(bad: float) -> None:
    batch = random_batch()
    masked = batch["weights"] == 0
    assert 5 < masked.sum() < 35
    clean = {**batch, "logprobs": batch["logprobs"].clone().requires_grad_()}
    dirty = {name: value if name == "weights" else value.masked_fill(masked, bad) for name, value in batch.items()}
    dirty["logprobs"].requires_grad_()
    results = []
    for inputs in (clean, dirty):
        loss, metrics = policy_loss(**inputs, denominator=7.0, clip_low=LOW, clip_high=HIGH)
        loss.backward()
        results.append([loss.detach(), inputs["logprobs"].grad, *metrics.values()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][1][masked] == 0).all()


# Forward KL


def random_topk() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 40, 7, generator=generator) * 2
    weights = torch.rand(40, generator=generator) * (torch.rand(40, generator=generator) > 0.3)
    student, teacher = torch.log_softmax(logits, -1)[..., :4]
    return {"student_topk_logprobs": student, "teacher_topk_logprobs": teacher, "weights": weights}


def slow_forward_kl(student: list[float], teacher: list[float]) -> float:
    p, q = ([math.exp(value) for value in row] for row in (teacher, student))
    return sum(a * math.log(a / b) for a, b in zip([*p, 1 - sum(p)], [*q, 1 - sum(q)], strict=True))


def test_forward_kl_is_a_weighted_sum() -> None:
    batch = random_topk()
    loss, metrics = forward_kl_loss(**batch, denominator=7.0)
    rows = zip(*(value.tolist() for value in batch.values()), strict=True)
    expected = sum(weight * slow_forward_kl(student, teacher) for student, teacher, weight in rows) / 7.0
    assert expected > 0.1 and loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics.keys() == {"forward_kl"} and metrics["forward_kl"].item() == loss.item()


def test_a_step_down_the_forward_kl_raises_what_the_teacher_prefers() -> None:
    student = torch.tensor([[0.2, 0.6], [0.2, 0.6]]).log().requires_grad_()
    loss, metrics = forward_kl_loss(student, torch.tensor([[0.7, 0.1]] * 2).log(), torch.tensor([1.0, 0.0]), 2.0)
    loss.backward()
    # By log q_k: (p_rest q_k / q_rest - p_k) / 2.
    torch.testing.assert_close(student.grad, torch.tensor([[-0.25, 0.25], [0.0, 0.0]]))
    assert not metrics["forward_kl"].requires_grad


def test_splits_of_the_forward_kl_add_up() -> None:
    batch = random_topk()
    whole, _ = forward_kl_loss(**batch, denominator=7.0)
    parts = []
    for part in (slice(0, 11), slice(11, 40), slice(40, 40)):
        parts.append(forward_kl_loss(**{name: value[part] for name, value in batch.items()}, denominator=7.0)[0])
    torch.testing.assert_close(sum(parts), whole)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_rows_of_the_forward_kl_are_never_read(bad: float) -> None:
    clean = random_topk()
    masked = clean["weights"] == 0
    assert 5 < masked.sum() < 35
    dirty = {
        name: value if name == "weights" else value.masked_fill(masked[:, None], bad) for name, value in clean.items()
    }
    results = []
    for inputs in (clean, dirty):
        student = inputs["student_topk_logprobs"] = inputs["student_topk_logprobs"].clone().requires_grad_()
        loss, _ = forward_kl_loss(**inputs, denominator=7.0)
        loss.backward()
        results.append([loss.detach(), student.grad])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert (results[1][1][masked] == 0).all() and results[1][1][~masked].any(dim=1).all()


def test_all_masked_is_a_loss_of_zero() -> None:
    batch = random_topk()
    batch["weights"] = torch.zeros(40)
    student = batch["student_topk_logprobs"] = batch["student_topk_logprobs"].requires_grad_()
    loss, metrics = forward_kl_loss(**batch, denominator=1.0)
    loss.backward()
    assert loss.item() == metrics["forward_kl"].item() == 0.0 and not student.grad.any()
