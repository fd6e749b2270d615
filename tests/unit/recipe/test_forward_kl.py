"""The coarsened forward KL against loops, torch's full KL, and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.recipe.forward_kl import forward_kl

ROWS, VOCAB = 5, 9


def case(seed: int, k: int, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Student logits [ROWS, VOCAB], teacher log-probs [ROWS, VOCAB] and its k most likely ids, in float64."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, VOCAB, generator=generator, dtype=torch.float64) * scale for _ in range(2))
    return student, torch.log_softmax(teacher, -1), teacher.topk(k).indices


def at(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits, -1).gather(1, ids)


def slow(student: list[float], teacher: list[float]) -> float:
    """KL of the coarsened distributions from log-probs, term by term."""
    p, q = ([math.exp(value) for value in row] for row in (teacher, student))
    p, q = [*p, 1 - sum(p)], [*q, 1 - sum(q)]
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 1e-15)


def full_kl(student: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    logprobs = torch.log_softmax(student, -1)
    return torch.nn.functional.kl_div(logprobs, teacher_logprobs, reduction="none", log_target=True).sum(-1)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, VOCAB - 1))
def test_value_matches_the_loop_and_bounds_the_full_divergence_from_below(seed, k) -> None:
    student, teacher, ids = case(seed, k)
    found = forward_kl(at(student, ids), teacher.gather(1, ids))
    rows = zip(at(student, ids).tolist(), teacher.gather(1, ids).tolist(), strict=True)
    assert found.tolist() == pytest.approx([slow(*row) for row in rows], abs=1e-12)
    full = full_kl(student, teacher)
    assert (found > -1e-12).all() and (found <= full + 1e-12).all()
    if k == VOCAB - 1:  # the bucket holds one token: nothing is merged
        torch.testing.assert_close(found, full)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_give_the_full_divergence_and_its_gradient(dtype: torch.dtype) -> None:
    student, teacher, ids = case(seed=1, k=VOCAB)
    ours, theirs = (student.to(dtype).requires_grad_() for _ in range(2))
    found, expected = forward_kl(at(ours, ids), teacher.gather(1, ids).to(dtype)), full_kl(theirs, teacher.to(dtype))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_gradient_equals_finite_differences(k: int) -> None:
    student, teacher, ids = case(seed=2, k=k)
    known = teacher.gather(1, ids)
    assert torch.autograd.gradcheck(lambda logits: forward_kl(at(logits, ids), known), student.requires_grad_())
    logprobs = at(student, ids).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda values: forward_kl(values, known), logprobs)


def test_gradient_by_logits_by_formula() -> None:
    """q_j - p_j at the K tokens; elsewhere q_j - p_rest q_j / q_rest. Descent moves mass to where the teacher is."""
    student, teacher, ids = case(seed=3, k=3)
    student.requires_grad_()
    forward_kl(at(student, ids), teacher.gather(1, ids)).sum().backward()
    p, q = teacher.exp(), torch.softmax(student.detach(), -1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter_(1, ids, True)
    rest = (p * ~chosen).sum(-1, keepdim=True) / (q * ~chosen).sum(-1, keepdim=True)
    torch.testing.assert_close(student.grad, torch.where(chosen, q - p, q - rest * q))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [0, 1, 4, VOCAB])
def test_equal_distributions_are_a_stationary_zero(k: int, dtype: torch.dtype) -> None:
    student, _, _ = case(seed=4, k=k)
    student = student.to(dtype).requires_grad_()
    logprobs = at(student, student.topk(k).indices)
    found = forward_kl(logprobs, logprobs.detach())
    found.sum().backward()
    assert found.tolist() == [0.0] * ROWS
    assert student.grad.abs().max() < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("peak", [15.0, 40.0, 200.0])
def test_a_student_without_a_rest_has_finite_gradients(peak: float, dtype: torch.dtype) -> None:
    """sum of q_k rounds to 1, or above, while the teacher still has a rest."""
    logits = torch.zeros(1, VOCAB, dtype=dtype)
    logits[0, 0] = peak
    logits.requires_grad_()
    teacher = torch.full((1, 2), math.log(0.3), dtype=dtype)
    logprobs = at(logits, torch.tensor([[0, 1]]))
    found = forward_kl(logprobs, teacher)
    found.sum().backward()
    assert torch.isfinite(found).all() and (found > 0).all()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().max() < 2
    assert logits.grad[0, 0] > 0  # descent lowers the peak
    above = torch.tensor([[1e-6, -9.0]], dtype=dtype, requires_grad=True)
    forward_kl(above, teacher).sum().backward()
    assert torch.isfinite(above.grad).all()


def test_a_teacher_without_a_rest_or_with_an_impossible_token_gives_numbers() -> None:
    student = torch.tensor([[0.7, 0.2], [0.7, 0.2], [1.0, 0.0]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.5], [1.0, 0.0], [1.0, 0.0]]).log()
    found = forward_kl(student, teacher)
    found.sum().backward()
    expected = [0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.2), math.log(1 / 0.7), 0.0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert torch.isfinite(student.grad).all() and student.grad[1, 1] == 0


def test_a_student_that_rules_out_what_the_teacher_says_is_infinitely_far() -> None:
    assert forward_kl(torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.5, 0.5]]).log()).tolist() == [math.inf]


def test_a_missing_teacher_is_not_a_number() -> None:
    assert forward_kl(torch.full((2, 2), -1.0), torch.tensor([[math.nan, -1.0], [-1.0, -1.0]])).isnan().tolist() == [
        True,
        False,
    ]


def test_nothing_known_gives_zeros_and_nothing_gives_nothing() -> None:
    student = torch.empty(3, 0, requires_grad=True)
    found = forward_kl(student, torch.empty(3, 0))
    found.sum().backward()
    assert found.tolist() == [0.0] * 3 and student.grad.shape == (3, 0)
    assert forward_kl(torch.empty(0, 4), torch.empty(0, 4)).shape == (0,)


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((2, 3), (1, 3)), ((3,), (3,))])
def test_other_shapes_are_refused(shapes: tuple) -> None:
    with pytest.raises(ValueError, match=r"expected \[T, K\]"):
        forward_kl(*(torch.zeros(shape) for shape in shapes))
