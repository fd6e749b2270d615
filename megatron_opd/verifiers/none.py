"""For domains whose responses nothing can judge."""

from __future__ import annotations

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, unknown


class NoVerifier:
    """Always UNKNOWN."""

    def __init__(self, config: VerifierConfig) -> None:
        """Nothing is needed."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """UNKNOWN, whatever the response."""
        return unknown("the domain has no verifier")
