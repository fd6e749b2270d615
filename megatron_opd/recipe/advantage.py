"""From log-probs to per-token advantages and weights. Pure numpy."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_opd.records import Scored, TrainSample


def token_gaps(teacher_logprobs: np.ndarray, student_logprobs: np.ndarray) -> np.ndarray:
    """Sampled-token advantage of on-policy distillation: log pi_T(o_t) - log pi_student(o_t), [R] float32.

    Positive where the teacher prefers the token; its mean over the student's samples is minus the reverse KL divergence
    (Uni-OPD, arXiv 2605.03677, equations 1 to 3). Raises ValueError when the lengths differ.
    """
    if teacher_logprobs.shape != student_logprobs.shape:
        raise ValueError(f"{teacher_logprobs.shape} teacher log-probs for {student_logprobs.shape} student log-probs")
    return (teacher_logprobs - student_logprobs).astype(np.float32)


def gap_mask(gaps: np.ndarray, max_gap: float) -> np.ndarray:
    """True where a token is trained on: |gap| < ``max_gap`` and finite."""
    return np.abs(gaps) < max_gap  # false for NaN as well


def token_weights(mask: np.ndarray, normalize: Literal["sequence", "token"]) -> np.ndarray:
    """Weight of each token in the numerator of the loss, [R] float32; 0 where masked.

    "sequence": the sequence's valid tokens share a weight of 1; "token": each valid token weighs 1. In both, the
    denominator of the loss is the sum over the global batch of ``sum(weights)``. All masked: all 0.
    """
    valid = int(mask.sum())
    share = 1.0 if normalize == "token" else 1.0 / max(valid, 1)
    return np.where(mask, share, 0.0).astype(np.float32)


def train_sample(scored: Scored, max_gap: float, normalize: Literal["sequence", "token"]) -> TrainSample:
    """The training sequence of a scored rollout; the student's log-probs are those of the engine that sampled it."""
    rollout = scored.verified.rollout
    gaps = token_gaps(scored.teacher_logprobs, rollout.logprobs)
    mask = gap_mask(gaps, max_gap)
    prompt_ids = np.array(rollout.prompt.token_ids, dtype=np.int64)
    return TrainSample(
        token_ids=np.concatenate([prompt_ids, rollout.token_ids]),
        prompt_length=len(prompt_ids),
        advantages=np.where(mask, gaps, 0.0).astype(np.float32),
        behaviour_logprobs=rollout.logprobs,
        weights=token_weights(mask, normalize),
    )
