r"""Mathematical answers: Math-Verify on the last \boxed{} of the response against the reference.

verify(..., r"... so it is \boxed{\frac{1}{2}}", "0.5")         -> CORRECT, "equal"
verify(..., r"... so it is \boxed{17}", "9 + 9 = 18\n#### 18")  -> INCORRECT, "got 17, expected 18"
"""

from __future__ import annotations

import logging

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown

BOX = r"\boxed{"
LONGEST_ANSWER = 2000  # characters; sympy takes minutes for what nobody meant as an answer


class MathVerifier:
    """Compares values, not spellings: 0.5, 1/2 and \\frac{1}{2} are equal."""

    def __init__(self, config: VerifierConfig) -> None:
        """Import Math-Verify. The time limit is the pool's to keep: only a kill ends a loop inside sympy."""
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own timers are off
        self._parse, self._compare = math_verify.parse, math_verify.verify

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """CORRECT if the last box equals the reference; UNKNOWN if Math-Verify crashes on either."""
        answer, expected = last_box(response), reference_answer(reference)
        if answer is None:
            return incorrect(r"no \boxed{} found")
        if len(answer) > LONGEST_ANSWER:
            return incorrect(rf"the last \boxed{{}} has {len(answer)} characters, more than {LONGEST_ANSWER}")
        if not answer:
            return incorrect(r"the last \boxed{} is empty or not closed")
        if answer == expected:
            return correct("equal")
        try:
            return self._compare_values(answer, expected)
        except Exception as error:  # noqa: BLE001 - sympy and the LaTeX parser raise anything; it is not the answer's fault
            return unknown(clip(f"Math-Verify failed: {type(error).__name__}: {error}"))

    def _compare_values(self, answer: str, expected: str) -> Verdict:
        gold = self._values(expected)
        if not gold:
            return unknown(f"the reference is not mathematics: {clip(expected)}")
        if self._compare(gold, self._values(answer), timeout_seconds=None, raise_on_error=True):
            return correct("equal")
        return incorrect(f"got {clip(answer)}, expected {clip(expected)}")

    def _values(self, latex: str) -> list:
        return self._parse(f"{BOX}{latex}}}", parsing_timeout=None, raise_on_error=True)


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}``, "" if its brace never closes, None if there is no box."""
    start = text.rfind(BOX)
    if start < 0:
        return None
    depth, begin, escaped = 1, start + len(BOX), False
    for end in range(begin, len(text)):
        if escaped or text[end] == "\\":  # an escaped brace is a character of a set, not a group
            escaped = not escaped
            continue
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return _tidy(text[begin:end])
    return ""


def reference_answer(reference: str) -> str:
    r"""The answer inside a reference: what follows the last ``####`` (GSM8K), or the last box, or all of it."""
    if "####" in reference:
        return _tidy(reference.rpartition("####")[2])
    return last_box(reference) or _tidy(reference)


def _tidy(latex: str) -> str:
    """Without the blanks, dollar signs and full stop around it."""
    return latex.strip().rstrip(".").strip("$").strip()
