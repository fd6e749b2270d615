"""One number: the last one in the final answer against that of the reference.

verify(..., "It costs $1,250.50 in total.", "1250.5")   -> CORRECT, "equal"
verify(..., "The answer is 3/4.", "0.75")               -> CORRECT, "equal"
"""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown
from megatron_opd.verifiers.final_answer import differ, final_answer, references, tidy

TOLERANCE = Fraction(1, 10**6)  # relative: the last digits of a rounded fraction
DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d{1,400})"
NUMBER = re.compile(
    rf"(?<![\w.])(?P<sign>[-+\u2212]?)\$?\s?(?P<whole>{DIGITS}(?:\.\d{{0,400}})?|\.\d{{1,400}})"
    rf"(?:[eE](?P<power>[-+]?\d{{1,3}}))?(?:\s?/\s?(?P<below>[1-9]\d{{0,400}}))?(?:\s?\\?(?P<percent>%))?"
)


class NumericVerifier:
    """For answers that are plain numbers; ``math`` knows expressions."""

    def __init__(self, config: VerifierConfig) -> None:
        """Nothing is needed."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """UNKNOWN if no reference has a number."""
        expected = [number for item in references(reference) if (number := last_number(tidy(item))) is not None]
        if not expected:
            return unknown(f"the reference is not a number: {clip(reference)}")
        answer = final_answer(response)
        got = last_number(answer)
        if got is None:
            return incorrect(f"no number found in: {clip(answer)}")
        return correct("equal") if any(equal(got, item) for item in expected) else incorrect(differ(answer, reference))


def last_number(text: str) -> tuple[Fraction, bool] | None:
    """The last number in a text, and whether a percent sign follows it; None without one."""
    matches = list(NUMBER.finditer(text))
    if not matches:
        return None
    parts = matches[-1].groupdict()
    value = Fraction(parts["whole"].replace(",", "").rstrip(".")) * Fraction(10) ** int(parts["power"] or 0)
    value /= int(parts["below"] or 1)
    return (value if parts["sign"] in ("", "+") else -value), bool(parts["percent"])


def equal(got: tuple[Fraction, bool], expected: tuple[Fraction, bool]) -> bool:
    """Within the tolerance. With one percent sign between them, 50% equals both 50 and 0.5."""
    if got[1] == expected[1]:
        return _close(got[0], expected[0])
    percent, plain = (got[0], expected[0]) if got[1] else (expected[0], got[0])
    return _close(percent, plain) or _close(percent / 100, plain)


def _close(left: Fraction, right: Fraction) -> bool:
    return abs(left - right) <= TOLERANCE * abs(right)
