"""Options of ``megatron-opd prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_opd.config.base import PositiveInt, Section


class PrepareConfig(Section):
    """What is made of published files."""

    domain: str | None = None
    """Domain of all records; null takes that of the format, or of the record."""
    template: bool = True
    """Add the paper's instruction to each question."""
    min_difficulty: float | None = None
    """Least difficulty of a record (deepmath); null takes all."""
    images: Path | None = None
    """Folder that relative paths of images are of; null takes the folder of their file."""
    tokenizer: Path | None = None
    """Model folder whose tokenizer counts for max_tokens."""
    max_tokens: PositiveInt | None = None
    """Longest prompt after the chat template; null drops none."""
    benchmarks: tuple[tuple[str, Path], ...] = ()
    """Formats and files whose questions must not be trained on."""
    ngram: PositiveInt = 13
    """Words in a row that a question may not share with a benchmark."""
    max_bad: Annotated[int, Field(ge=0)] = 0
    """Records that may be unusable."""
