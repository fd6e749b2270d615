"""Relaxed accuracy of ChartQA: numbers may be off by 5 %, texts must be the same.

verify(..., "The answer is 104", "100")   -> CORRECT, "within 5 %"
verify(..., "The answer is 106", "100")   -> INCORRECT, "got 106, expected 100"

As in the benchmark's published code: a number with a percent sign is divided by 100, a reference of 0 must be matched
as a text, and years are numbers too. Unlike there, commas between thousands are ignored.
"""

from __future__ import annotations

import math

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, correct, incorrect
from megatron_opd.verifiers.final_answer import differ, final_answer, references, tidy

TOLERANCE = 0.05


class ChartVerifier:
    """A reference may be a JSON list of accepted answers."""

    def __init__(self, config: VerifierConfig) -> None:
        """Nothing is needed."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """CORRECT if the final answer is within 5 % of a reference, or the same text."""
        answer = final_answer(response)
        for item in map(tidy, references(reference)):
            got, expected = number(answer), number(item)
            if got is None or not expected:
                if answer.casefold() == item.casefold():
                    return correct("equal")
            elif abs(got - expected) <= TOLERANCE * abs(expected):
                return correct("within 5 %")
        return incorrect(differ(answer, reference))


def number(text: str) -> float | None:
    """The number that a text is, as a share if it ends with a percent sign."""
    percent = text.endswith("%")
    try:
        value = float(text.rstrip("\\%").replace(",", ""))
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    return value / 100 if percent else value
