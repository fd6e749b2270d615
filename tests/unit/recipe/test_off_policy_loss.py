"""The loss of tokens that older weights drew, against slow formulas and exact expectations."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_opd.recipe.policy_loss import off_policy_loss, policy_loss

CAP = 1.5


def slow(logprob: float, behaviour: float, advantage: float, slope: float) -> tuple[float, float, float, bool]:
    """Derivative of one token's loss by ``logprob``, the advantage now, the weight, and whether it is truncated."""
    ratio = math.exp(logprob) / math.exp(behaviour)
    now = advantage - slope * (logprob - behaviour)
    weight = CAP if ratio > CAP else ratio
    return -weight * now, now, weight, ratio > CAP


def random_batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(40, generator=generator)
    return {
        "logprobs": logprobs,
        "behaviour_logprobs": logprobs + torch.randn(40, generator=generator) * 0.6,
        "advantages": torch.randn(40, generator=generator),
        "slopes": torch.rand(40, generator=generator) * 2,
        "weights": torch.rand(40, generator=generator) * (torch.rand(40, generator=generator) > 0.3),
    }


def test_loss_gradient_and_metrics_are_those_of_the_slow_formula() -> None:
    batch = random_batch()
    batch["logprobs"].requires_grad_()
    loss, metrics = off_policy_loss(**batch, denominator=7.0, cap=CAP)
    loss.backward()
    tokens = list(zip(*(batch[name].tolist() for name in batch), strict=True))
    found = [slow(*token[:4]) for token in tokens]
    shares = [token[4] / 7.0 for token in tokens]
    assert 3 < sum(truncated for _, _, _, truncated in found) < 30
    derivatives = [share * one[0] for share, one in zip(shares, found, strict=True)]
    assert batch["logprobs"].grad.tolist() == pytest.approx(derivatives, rel=1e-4, abs=1e-6)
    assert loss.item() == pytest.approx(sum(derivatives), rel=1e-5)
    expected = {
        "advantage": sum(share * one[1] for share, one in zip(shares, found, strict=True)),
        "abs_advantage": sum(share * abs(one[1]) for share, one in zip(shares, found, strict=True)),
        "stale_share": sum(shares),
        "importance_weight": sum(share * one[2] for share, one in zip(shares, found, strict=True)),
        "truncated_share": sum(share * one[3] for share, one in zip(shares, found, strict=True)),
    }
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("parts", [[slice(0, 11), slice(11, 40)], [slice(i, i + 1) for i in range(40)]])
def test_splits_add_up(parts: list[slice]) -> None:
    batch = random_batch()
    whole, whole_metrics = off_policy_loss(**batch, denominator=7.0, cap=CAP)
    found = [off_policy_loss(**{k: v[part] for k, v in batch.items()}, denominator=7.0, cap=CAP) for part in parts]
    torch.testing.assert_close(sum(loss for loss, _ in found), whole)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(metrics[name] for _, metrics in found), value)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_masked_tokens_are_never_read(bad: float) -> None:
    batch = random_batch()
    masked = batch["weights"] == 0
    assert 5 < masked.sum() < 35
    dirty = {name: value if name == "weights" else value.masked_fill(masked, bad) for name, value in batch.items()}
    results = []
    for inputs in (batch, dirty):
        inputs["logprobs"].requires_grad_()
        loss, metrics = off_policy_loss(**inputs, denominator=7.0, cap=CAP)
        loss.backward()
        results.append([loss.detach(), inputs["logprobs"].grad, *metrics.values()])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def expected_gradient(logits: torch.Tensor, behaviour: torch.Tensor, teacher: torch.Tensor, slope: float) -> list:
    """Gradient by ``logits`` [V] of the expectation of the loss over every token that ``behaviour`` [V] can draw."""
    logits = logits.clone().requires_grad_()
    logprobs = logits.log_softmax(0)
    batch = (logprobs, behaviour, teacher - behaviour, torch.full_like(logits, slope), behaviour.exp())
    off_policy_loss(*batch, denominator=1.0, cap=math.inf)[0].backward()
    return logits.grad.tolist()


def test_the_expectation_is_the_gradient_of_the_reverse_kl_at_the_current_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, old, taught = torch.randn(3, 9, generator=generator, dtype=torch.float64)
    behaviour, teacher = old.log_softmax(0), taught.log_softmax(0)

    def kl_gradient(other: torch.Tensor) -> list[float]:
        current = logits.clone().requires_grad_()
        logprobs = current.log_softmax(0)
        (logprobs.exp() * (logprobs - other)).sum().backward()
        return current.grad.tolist()

    exact = kl_gradient(teacher)
    assert expected_gradient(logits, behaviour, teacher, 1.0) == pytest.approx(exact, abs=1e-12)
    # With the log-prob of the weights that drew the token, the student is driven away from these weights as well.
    away = [one - other for one, other in zip(exact, kl_gradient(behaviour), strict=True)]
    assert expected_gradient(logits, behaviour, teacher, 0.0) == pytest.approx(away, abs=1e-12)
    assert max(abs(one - other) for one, other in zip(away, exact, strict=True)) > 0.05


def test_at_equal_weights_it_is_the_on_policy_gradient() -> None:
    batch = random_batch() | {"behaviour_logprobs": random_batch()["logprobs"]}
    gradients = []
    for stale in (True, False):
        inputs = {name: value.clone() for name, value in batch.items()}
        inputs["logprobs"].requires_grad_()
        if stale:
            loss, _ = off_policy_loss(**inputs, denominator=7.0, cap=CAP)
        else:
            del inputs["slopes"]
            loss, _ = policy_loss(**inputs, denominator=7.0, clip_low=0.2, clip_high=0.28)
        loss.backward()
        gradients.append(inputs["logprobs"].grad)
    torch.testing.assert_close(*gradients)
