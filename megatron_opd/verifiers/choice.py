r"""Multiple choice: the letter of the response against the letter of the reference.

verify(..., r"... \boxed{\text{(B)}}", "B")        -> CORRECT, "equal"
verify(..., "The answer is C: the fox.", "(B)")    -> INCORRECT, "got C, expected B"
"""

from __future__ import annotations

import re

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, clip, correct, incorrect, unknown
from megatron_opd.verifiers.final_answer import final_answer, tidy

# A letter by itself or with the text of its choice after it: "B", "(b)", "B. the fox", "option B". "A and B" is none.
LETTER = re.compile(
    r"(?:(?:the )?(?:option|choice) )?(?:[(\[]([A-Z])[)\]](?:[.:]? .+|[.:]?)|([A-Z])(?:[).:] .+| [-:] .+|[).:]?))",
    re.IGNORECASE | re.DOTALL,
)


class ChoiceVerifier:
    """Letters only; the texts of the choices are not known here."""

    def __init__(self, config: VerifierConfig) -> None:
        """Nothing is needed."""

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """UNKNOWN if the reference is no letter."""
        expected = letter(tidy(reference))
        if expected is None:
            return unknown(f"the reference is not a letter: {clip(reference)}")
        answer = final_answer(response)
        got = letter(answer)
        if got is None:
            return incorrect(f"no letter found in: {clip(answer)}")
        return correct("equal") if got == expected else incorrect(f"got {got}, expected {expected}")


def letter(answer: str) -> str | None:
    """The letter that an answer chooses, in upper case."""
    match = LETTER.fullmatch(answer)
    return (match.group(1) or match.group(2)).upper() if match else None
