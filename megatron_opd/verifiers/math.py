r"""Mathematical answers: Math-Verify on the last \boxed{} of the response against the reference.

verify(..., r"... so it is \boxed{\frac{1}{2}}", "0.5")         -> CORRECT, "equal"
verify(..., r"... so it is \boxed{17}", "9 + 9 = 18\n#### 18")  -> INCORRECT, "got 17, expected 18"
"""

from __future__ import annotations

import logging
import re

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown

BOX = r"\boxed{"
PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*(?:\\?%|percent)\s*\}|\bpercent)$")
WITH_UNIT = re.compile(r"^([-+]?\$?[\d.,]+)\s+(?!.*(?:hundred|thousand|illion|dozen))([A-Za-z][a-z]+(?: [a-z]+)*)$")
SCIENTIFIC = re.compile(r"^([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})$")
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
        gold, gold_percent = split_percent(expected)
        value, percent = split_percent(answer)
        if not self._values(gold):
            return unknown(f"the reference is not mathematics: {clip(expected)}")
        pairs = [(gold, value)]
        if percent and not gold_percent:  # "what share": 0.5 or 50; a percent sign on one side fits both
            pairs.append((gold, hundredth(value)))
        if gold_percent and not percent:
            pairs.append((hundredth(gold), value))
        if any(self._equal(left, right) for left, right in pairs):
            return correct("equal")
        return incorrect(f"got {clip(answer)}, expected {clip(expected)}")

    def _equal(self, gold: str, value: str) -> bool:
        return self._compare(self._values(gold), self._values(value), timeout_seconds=None, raise_on_error=True)

    def _values(self, latex: str) -> list:
        return self._parse(f"{BOX}{spell_out(latex)}}}", parsing_timeout=None, raise_on_error=True)


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


def split_percent(latex: str) -> tuple[str, bool]:
    """An answer without its percent sign, and whether it had one: Math-Verify does not parse it inside a box."""
    match = PERCENT.search(latex)
    return (latex[: match.start()].strip("$ "), True) if match and match.start() else (latex, False)


def hundredth(latex: str) -> str:
    """A hundredth of a value."""
    return rf"\frac{{{latex}}}{{100}}"


def spell_out(latex: str) -> str:
    """Two forms of a plain number that Math-Verify takes for products of letters: "5 dollars" and "2.5e3"."""
    latex = WITH_UNIT.sub(r"\1\\text{ \2}", latex)
    return SCIENTIFIC.sub(r"\1 \\times 10^{\2}", latex)


def _tidy(latex: str) -> str:
    """Without the blanks, dollar signs and full stop around it."""
    return latex.strip().rstrip(".").strip("$").strip()
