"""What the most likely tokens of a distribution tell: its entropy, and how far two models agree. Pure numpy.

Legend: R positions, K most likely tokens of each; log-probs in nats.
"""

from __future__ import annotations

import numpy as np


def topk_entropy(logprobs: np.ndarray) -> np.ndarray:
    """Entropy of each row's K tokens and one bucket for all others: [R] float64, nats, 0 to log(K + 1).

        H = - sum over k of p_k log p_k - p_rest log p_rest          p_rest = max(0, 1 - sum of p_k)

    ``logprobs`` [R, K] float, -inf for a token without probability. H is a lower bound of the true entropy: merging
    outcomes loses what told them apart. That holds up to the rounding of the log-probs (a few 1e-6 in float32); a mass
    that rounds above 1 leaves no rest. A row with a nan gives nan.
    """
    masses = np.exp(logprobs.astype(np.float64))
    rest = np.maximum(1.0 - masses.sum(axis=1, keepdims=True), 0.0)
    masses = np.concatenate([masses, rest], axis=1)
    entropy = -(masses * np.log(np.where(masses > 0, masses, 1.0))).sum(axis=1)  # 0 log 0 = 0
    return np.maximum(entropy, 0.0)


def topk_overlap(first_ids: np.ndarray, second_ids: np.ndarray) -> np.ndarray:
    """Share of the K most likely tokens that two models have in common: [R] float64, 0 to 1, |A and B| / K.

    Both [R, K] integer, in any order, no id twice in a row (not checked: a repeated one would count as common).
    Source: Rethinking OPD (arXiv 2604.13016). Raises ValueError for other shapes, or K = 0. Cost: one sort,
    O(R K log K) time and O(R K) memory.
    """
    if first_ids.shape != second_ids.shape or first_ids.ndim != 2 or first_ids.shape[1] < 1:
        raise ValueError(f"got ids {first_ids.shape} and {second_ids.shape}, expected one [R, K] with K >= 1")
    both = np.sort(np.concatenate([first_ids, second_ids], axis=1), axis=1)
    return (both[:, 1:] == both[:, :-1]).sum(axis=1) / first_ids.shape[1]


def entropy_gate(logprobs: np.ndarray, threshold: float) -> np.ndarray:
    """True where the teacher is unsure, [R] bool: ``topk_entropy(logprobs) > threshold``, threshold in nats.

    As that is a lower bound, the gate opens only where the true entropy is above the threshold as well, and from
    log(K + 1) on it never opens. False for a row with a nan. Source: EOPD (arXiv 2603.07079), with a hard gate.
    """
    return topk_entropy(logprobs) > threshold
