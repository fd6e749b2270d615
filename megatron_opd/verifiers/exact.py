"""Texts that must be the same, but for case, blanks, quotes and a full stop.

verify(..., "The answer is Paris.", "paris")       -> CORRECT, "equal"
verify(..., "Lyon", '["Paris", "City of Light"]')  -> INCORRECT, 'got Lyon, expected ["Paris", "City of Light"]'
"""

from __future__ import annotations

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, correct, incorrect
from megatron_opd.verifiers.final_answer import differ, final_answer, references, tidy


class ExactVerifier:
    """A reference may be a JSON list of accepted texts."""

    def __init__(self, config: VerifierConfig) -> None:
        """Nothing is needed."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """CORRECT if the final answer is one of the accepted texts."""
        answer = final_answer(response)
        accepted = {tidy(item).casefold() for item in references(reference)}
        return correct("equal") if answer.casefold() in accepted else incorrect(differ(answer, reference))
