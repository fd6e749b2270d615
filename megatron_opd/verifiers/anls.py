"""Answers read from documents: Average Normalised Levenshtein Similarity (Biten et al. 2019), made a yes or no.

verify(..., "The answer is Jon Smith", '["John Smith"]')   -> CORRECT, "similarity 0.90"

The similarity of two texts is 1 - edits / length of the longer one. The metric gives 0 to a similarity of 0.5 or less
and the similarity to others; here the best one among the references must be above ``verifiers.anls_threshold``.
"""

from __future__ import annotations

from megatron_opd.config import VerifierConfig
from megatron_opd.verifiers.base import Verdict, correct, incorrect
from megatron_opd.verifiers.final_answer import LONGEST_ANSWER, differ, final_answer, references, tidy


class AnlsVerifier:
    """A reference may be a JSON list of accepted answers."""

    def __init__(self, config: VerifierConfig) -> None:
        """Take the threshold."""
        self._threshold = config.anls_threshold

    def verify(self, prompt: str, response: str, reference: str) -> Verdict:
        """CORRECT if a reference is more similar than the threshold."""
        answer = final_answer(response)
        if len(answer) > LONGEST_ANSWER:
            return incorrect(f"the answer has {len(answer)} characters, more than {LONGEST_ANSWER}")
        best = max(similarity(answer.casefold(), tidy(item).casefold()) for item in references(reference))
        if best > self._threshold:
            return correct(f"similarity {best:.2f}")
        return incorrect(f"similarity {best:.2f}; {differ(answer, reference)}")


def similarity(left: str, right: str) -> float:
    """1 - edit distance / length of the longer text; 1 for two empty texts."""
    longer = max(len(left), len(right))
    return 1 - edits(left, right) / longer if longer else 1.0


def edits(left: str, right: str) -> int:
    """Levenshtein distance: fewest insertions, deletions and replacements of a character."""
    row = list(range(len(right) + 1))
    for number, letter in enumerate(left, start=1):
        above, row[0] = row[0], number
        for column, other in enumerate(right, start=1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (letter != other))
    return row[-1]
