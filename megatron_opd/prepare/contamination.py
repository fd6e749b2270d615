"""Whether a training question shares a run of words with a benchmark's.

The usual measure: any 13 words in a row that both have (GPT-3's paper, appendix C). Words are letters and digits
without regard to case, so that LaTeX and punctuation do not hide a copy. A benchmark's question of fewer words counts
where the training question is the same as a whole. In languages without blanks between words, a word is all text up to
the next punctuation, so that less is found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORD = re.compile(r"\w+")


@dataclass(frozen=True, slots=True)
class Match:
    """What a training question shares with a benchmark."""

    benchmark: str  # file and row
    words: str  # the first run that both have


class Benchmarks:
    """The questions that must not be trained on. Memory: about 100 bytes for each of their words.

    benchmarks = Benchmarks(words=13)
    benchmarks.add("aime24.jsonl:3", question)
    benchmarks.match(other)      # Match("aime24.jsonl:3", "each morning aya goes ...") or None
    """

    def __init__(self, words: int) -> None:
        self._words = words
        self._runs: dict[int, int] = {}  # hash of a run, or of all words of a short question, to the question
        self._names: list[str] = []

    def __len__(self) -> int:
        return len(self._names)

    def add(self, name: str, question: str) -> None:
        """Remember a question. ``name``: what it is called in a report."""
        for run in self._runs_of(question):
            self._runs.setdefault(hash(run), len(self._names))
        self._names.append(name)

    def match(self, question: str) -> Match | None:
        """The first shared run, if there is one."""
        for run in self._runs_of(question):
            found = self._runs.get(hash(run))
            if found is not None:
                return Match(self._names[found], run)
        return None

    def _runs_of(self, question: str) -> Iterator[str]:
        words = _WORD.findall(question.lower())
        if len(words) < self._words:
            yield "whole: " + " ".join(words)
        for start in range(len(words) - self._words + 1):
            yield " ".join(words[start : start + self._words])
