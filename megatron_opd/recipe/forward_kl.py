"""Forward KL divergence to a teacher of which only the most likely tokens are known."""

from __future__ import annotations

import torch


def forward_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) over the teacher's K most likely tokens and one bucket for all others: [T], nats.

        sum over k of p_k (log p_k - log q_k) + p_rest (log p_rest - log q_rest)     x_rest = 1 - sum over k of x_k

    teacher_logprobs [T, K] (log p): constants; student_logprobs [T, K] (log q): of the same tokens, carries the
    gradient. A lower bound of the full divergence by the data processing inequality: merging outcomes cannot raise it.
    A token with p_k = 0 gives 0, and so does the bucket for p_rest = 0. At p = q the value is exactly 0, and the
    gradient by the student's logits is 0 up to rounding. K = 0 gives zeros. Raises ValueError when the shapes differ.

    Rounding: x_rest is known to about the type's eps, and no better. The bucket's part of the gradient is therefore
    good to p_rest * eps / q_rest; where x_rest is below eps, eps stands for it in the logarithm, without a gradient.
    """
    if student_logprobs.shape != teacher_logprobs.shape or teacher_logprobs.ndim != 2:
        raise ValueError(
            f"got student {tuple(student_logprobs.shape)} and teacher {tuple(teacher_logprobs.shape)}, expected [T, K]"
        )
    teacher = teacher_logprobs.exp()
    # Selecting before multiplying: 0 * inf would be nan.
    gaps = torch.where(teacher > 0, teacher_logprobs - student_logprobs, 0.0)
    rest, student_rest = 1.0 - teacher.sum(dim=-1), 1.0 - student_logprobs.exp().sum(dim=-1)
    rest_gap = _log_or_least(rest) - _log_or_least(student_rest)
    return (teacher * gaps).sum(dim=-1) + rest.clamp(min=0.0) * rest_gap


def _log_or_least(mass: torch.Tensor) -> torch.Tensor:
    return mass.clamp(min=torch.finfo(mass.dtype).eps).log()
