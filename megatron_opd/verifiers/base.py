"""What a verifier is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_opd.records import Outcome


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one response is right, and why: ``Verdict(Outcome.INCORRECT, "3 of 5 tests failed")``."""

    outcome: Outcome
    reason: str  # one clause for a person


class Verifier(Protocol):
    """Decides about one response at a time, in a worker process that may be killed at any moment.

    An answer that is wrong, missing or harmful is INCORRECT; a verifier that fails itself says UNKNOWN.
    """

    def __init__(self, time_limit_s: float) -> None:
        """``time_limit_s``: what one call should stay within; the pool kills the worker a little later."""

    def verify(self, response: str, reference: str) -> Verdict:
        """Judge ``response`` (decoded, without special tokens) by ``reference`` (``Prompt.answer``)."""
        ...


def correct(reason: str) -> Verdict:
    """The response is right."""
    return Verdict(Outcome.CORRECT, reason)


def incorrect(reason: str) -> Verdict:
    """The response is wrong."""
    return Verdict(Outcome.INCORRECT, reason)


def unknown(reason: str) -> Verdict:
    """The verifier failed, or has nothing to say."""
    return Verdict(Outcome.UNKNOWN, reason)


def clip(text: object, limit: int = 120) -> str:
    """``text`` on one line, at most ``limit`` characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."
