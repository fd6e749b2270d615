"""Sampling, whichever engine does it: how to draw a response, and the response."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LARGEST_ANSWER_TOKEN = 1024  # most bytes of a sampled token in an answer: number, log-prob, text three times, escaped


@dataclass(frozen=True)
class Sampling:
    """How to draw a response. ``stop_token_ids`` end it and belong to it."""

    max_new_tokens: int
    temperature: float  # 0 is greedy
    stop_token_ids: tuple[int, ...]
    top_p: float = 1.0  # nucleus; the log-probs that come back are those of the whole distribution all the same
    top_k: int | None = None  # most likely tokens to draw from; None: all
    seed: int | None = None  # of the response, 0 .. 2**63 - 1; only a server in deterministic mode heeds it


@dataclass(frozen=True, eq=False)
class Generation:
    """One sampled response of R tokens, as the server returned it, checked."""

    token_ids: np.ndarray  # [R] int64
    logprobs: np.ndarray  # [R] float32, of the sampled tokens; at temperature 1 those of the model
    versions: np.ndarray  # [R] int64, weight version of each token; -1 before the first refresh
    finish_reason: str  # "stop" or "length"
    top_ids: np.ndarray | None  # [R, K] int64, most likely first, before top_p and top_k; None when not asked for
