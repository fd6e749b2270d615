"""For domains whose responses nothing can judge."""

from __future__ import annotations

from megatron_opd.verifiers.base import Verdict, unknown


class NoVerifier:
    """Always UNKNOWN."""

    def __init__(self, time_limit_s: float = 0.0) -> None:
        """Takes the time limit like every verifier; nothing here takes time."""

    def verify(self, response: str, reference: str) -> Verdict:
        """UNKNOWN, whatever the response."""
        return unknown("the domain has no verifier")
