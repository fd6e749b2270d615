"""From log-probs to per-token advantages and weights. Pure numpy."""

from __future__ import annotations

from typing import Literal

import numpy as np

from megatron_opd.config import ObjectiveConfig
from megatron_opd.recipe.topk import entropy_gate
from megatron_opd.records import Calibrated, Scored, TopRows, TrainSample


def token_gaps(teacher_logprobs: np.ndarray, student_logprobs: np.ndarray) -> np.ndarray:
    """Sampled-token advantage of on-policy distillation: log pi_T(o_t) - log pi_student(o_t), [R] float32.

    Positive where the teacher prefers the token; its mean over the student's samples is minus the reverse KL divergence
    (Uni-OPD, arXiv 2605.03677, equations 1 to 3). Raises ValueError when the lengths differ.
    """
    if teacher_logprobs.shape != student_logprobs.shape:
        raise ValueError(f"{teacher_logprobs.shape} teacher log-probs for {student_logprobs.shape} student log-probs")
    return (teacher_logprobs - student_logprobs).astype(np.float32)


def distillation_gaps(scored: Scored, objective: ObjectiveConfig, max_gap: float) -> tuple[np.ndarray, np.ndarray]:
    """The distillation term of each token's advantage, [R] float32, and which tokens may be trained on, [R] bool.

        gap = s log pi_T + (1 - s) log pi_ref - log pi_student     s = objective.teacher_scale; 1: no reference
        mask = |log pi_T - log pi_student| < max_gap and |gap| < max_gap
        gap <- min(max(gap, gap_floor), gap_ceiling)               where they are set

    s > 1 extrapolates beyond the teacher, away from the reference (ExOPD, arXiv 2602.12125). A floor takes the force
    out of tokens that the teacher finds absurd, as REOPOLD does (arXiv 2603.11137, there log(lambda / (1 - lambda))).
    Raises ValueError when lengths differ or the reference's log-probs are missing.
    """
    student = scored.verified.rollout.logprobs
    plain = token_gaps(scored.teacher_logprobs, student)
    gaps, mask = plain, gap_mask(plain, max_gap)
    if objective.teacher_scale != 1:
        if scored.reference_logprobs is None:
            raise ValueError("objective.teacher_scale needs the reference's log-probs, and there are none")
        # s T + (1 - s) F - S = s (T - S) + (1 - s) (F - S): differences first, they are small.
        scale = objective.teacher_scale
        gaps = (scale * plain + (1 - scale) * token_gaps(scored.reference_logprobs, student)).astype(np.float32)
        mask = mask & gap_mask(gaps, max_gap)
    if objective.gap_floor is not None or objective.gap_ceiling is not None:
        gaps = np.clip(gaps, objective.gap_floor, objective.gap_ceiling)
    return gaps, mask


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


def train_sample(
    item: Calibrated, objective: ObjectiveConfig, normalize: Literal["sequence", "token"], step: int
) -> TrainSample:
    """The training sequence of a rollout; the student's log-probs are those of the engine that sampled it.

    advantage = w_domain (gap + offset + outcome term)                       where the mask is true, else 0
    slope     = w_domain                                                     0 where gap_floor or gap_ceiling holds it
    forward weight = w_domain * objective.forward_kl * weight * [H_T > tau]  tau = objective.forward_kl_entropy
    """
    rollout = item.scored.verified.rollout
    factor = objective.domain_weights.get(rollout.prompt.domain, 1.0)
    advantages = factor * (item.gaps + item.offset + item.outcome_term)
    weights = token_weights(item.mask, normalize)
    prompt_ids = np.array(rollout.prompt.token_ids, dtype=np.int64)
    top, forward_weights = _forward_rows(item, objective, factor * weights)
    return TrainSample(
        token_ids=np.concatenate([prompt_ids, rollout.token_ids]),
        prompt_length=len(prompt_ids),
        advantages=np.where(item.mask, advantages, 0.0).astype(np.float32),
        behaviour_logprobs=rollout.logprobs,
        weights=weights,
        lags=(step - rollout.versions).astype(np.int32),
        slopes=np.where(_unclipped(item.gaps, objective), factor, 0.0).astype(np.float32),
        forward_weights=forward_weights,
        top_ids=top.ids,
        top_logprobs=top.logprobs,
        images=rollout.prompt.images,
    )


def _unclipped(gaps: np.ndarray, objective: ObjectiveConfig) -> np.ndarray:
    free = np.ones(len(gaps), dtype=bool)
    if objective.gap_floor is not None:
        free &= gaps > objective.gap_floor
    if objective.gap_ceiling is not None:
        free &= gaps < objective.gap_ceiling
    return free


def _forward_rows(item: Calibrated, objective: ObjectiveConfig, weights: np.ndarray) -> tuple[TopRows, np.ndarray]:
    """The teacher's rows and their weights [R]; rows of K = 0 when no forward KL is asked for."""
    if objective.forward_kl == 0:
        length = len(weights)
        return TopRows(np.empty((length, 0), np.int64), np.empty((length, 0), np.float32)), np.zeros_like(weights)
    top = item.scored.top
    if top is None:
        raise ValueError("objective.forward_kl needs the teacher's top-k rows, and there are none")
    gate = entropy_gate(top.logprobs, objective.forward_kl_entropy)
    return top, np.where(gate, objective.forward_kl * weights, 0.0).astype(np.float32)
