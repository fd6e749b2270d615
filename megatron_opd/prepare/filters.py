"""Why a sound record may still be left out: too long, a copy of an earlier one, or part of a benchmark."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import PrepareConfig
from megatron_opd.data.reading import chat_tokens
from megatron_opd.data.rows import Flaw
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.errors import DataError
from megatron_opd.prepare.contamination import Benchmarks
from megatron_opd.prepare.drafts import Draft, Skip
from megatron_opd.prepare.formats import new_format
from megatron_opd.prepare.sources import source_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LengthFilter:
    """The tokens of a prompt after the chat template, without those of images."""

    def __init__(self, folder: Path, most: int) -> None:
        """Raises ModelError if ``folder`` has no tokenizer."""
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(folder)
        self._most = most

    def excess(self, prompt: object) -> str | None:
        """What is wrong with a canonical prompt, if it is too long. Raises Flaw if the chat template refuses it."""
        messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        length = len(chat_tokens("prompt", messages, self._tokenizer))
        return f"{length} tokens, at most {self._most}" if length > self._most else None


class Seen:
    """Questions so far: a hash of each and of its answer, about 150 bytes of memory a record."""

    def __init__(self) -> None:
        self._answers: dict[bytes, int] = {}

    def repeated(self, draft: Draft) -> str | None:
        """Why a draft is no new question, if so. The same question with another answer is told apart."""
        key, answer = draft.key(), hash(draft.answer)
        if key not in self._answers:
            self._answers[key] = answer
            return None
        return "duplicate" if self._answers[key] == answer else "duplicate with another answer"


def read_benchmarks(given: tuple[tuple[str, Path], ...], words: int, options: PrepareConfig) -> Benchmarks:
    """All questions of benchmark files, each with the name of its format. Raises OpdError, also for a bad record."""
    benchmarks = Benchmarks(words)
    for name, path in given:
        converter, before = new_format(name, options), len(benchmarks)
        for row in source_rows(path, converter.columns):
            try:
                draft = converter.draft(row.record(), path.parent)
            except Skip:
                continue
            except Flaw as error:
                raise DataError(
                    "A benchmark's record cannot be used", where=f"{path}:{row.number}", got=error
                ) from error
            benchmarks.add(f"{path}:{row.number}", draft.question)
        if len(benchmarks) == before:
            raise DataError("A benchmark file is empty", where=path, got="no records", expected="at least one")
    return benchmarks
