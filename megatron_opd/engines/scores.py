"""Scoring, whichever engine does it: what is asked, what its answer says, and what a client must offer.

Legend: P prompt tokens, R response tokens, N = P + R, K most likely tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_opd.records import Image, TopRows

TokenIds = Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """Log-probs of a response."""

    token_ids: np.ndarray  # [N] int64, prompt and response
    prompt_length: int  # P, at least 1
    top_k: int  # K, 0: no rows
    vocab_size: int  # rows of the model's output, padding among them
    images: tuple[Image, ...] = ()  # of the prompt, whose placeholders are in token_ids

    @property
    def start(self) -> int:
        """First position that is asked for: the last of the prompt, so that the cache may hold all before it."""
        return self.prompt_length - 1

    @property
    def response_ids(self) -> np.ndarray:
        return self.token_ids[self.prompt_length :]


@dataclass(frozen=True, eq=False)
class PromptScores:
    """What an answer says, in the same form for all engines. Count, ids and first position are checked, values not."""

    logprobs: np.ndarray  # [R] float32; not finite where the answer has no number
    top: TopRows | None  # [R, K]; None when not asked for
    prompt_tokens: int  # that the server counted
    cached_tokens: int | None  # of these, taken from the prefix cache; None where the server does not tell
    finish_reason: str
    model: str | None  # what the answer calls the model; None where it does not
    weight_version: str | None  # likewise
    image_tokens: int | None = None  # placeholders that the server counted; None where it does not tell


@dataclass(frozen=True)
class Served:
    """What a server says of itself."""

    model: str  # path or name
    weight_version: str | None  # None where the engine has none
    longest: int  # most tokens of one request
    reply_model: str | None  # what each of its answers must call the model; None where answers do not say


class Require(Protocol):
    """Raises its caller's error unless the first argument is true; the second is the reason to count it under."""

    def __call__(self, ok: bool, kind: str, what: str, got: object, expected: object) -> None: ...


class ScoringClient(Protocol):
    """A server that scores."""

    url: str

    async def prompt_logprobs(
        self, token_ids: TokenIds, start: int, top_k: int = 0, images: Sequence[Image] = ()
    ) -> dict:
        """Raw reply with log-probs of positions ``start``.. of ``token_ids``, in which ``images`` have their places.

        Raises EngineError.
        """

    def read_scores(self, reply: dict, request: ScoreRequest, require: Require) -> PromptScores:
        """What ``reply`` says. KeyError, TypeError, ValueError, OverflowError: it is malformed."""

    async def served(self) -> Served:
        """What the server says of itself. Raises EngineError."""

    async def check_ready(self) -> None:
        """Raise EngineError unless the server takes requests."""
