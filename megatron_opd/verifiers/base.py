"""What a verifier is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_opd.config import VerifierConfig
from megatron_opd.records import Outcome

OWN_SHARE = 0.8  # of the timeout: what a verifier may use itself, so that it can say more than "timed out"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one response is right, and why: ``Verdict(Outcome.INCORRECT, "3 of 5 tests failed")``."""

    outcome: Outcome
    reason: str  # one clause for a person


class Verifier(Protocol):
    """Decides about one response at a time, in a worker process that may be killed at any moment.

    An answer that is wrong, missing or harmful is INCORRECT; a verifier that fails itself says UNKNOWN.
    """

    def __init__(self, config: VerifierConfig) -> None:
        """Import what is heavy: a worker starts once. Raises OpdError if this verifier cannot work here."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """Judge ``response`` (decoded, without special tokens) by ``reference`` (``Prompt.answer``).

        ``prompt`` is what the user said (``Prompt.text``). A call that takes longer than ``config.timeout_s`` is
        ended by a kill of the worker; one that ends itself stays within ``own_limit_s``.
        """
        ...


def own_limit_s(config: VerifierConfig) -> float:
    """Seconds that one call should stay within."""
    return OWN_SHARE * config.timeout_s


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
