"""What a format is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_opd.prepare.drafts import Draft


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """What may be said about the files of a data set."""

    domain: str | None = None  # of all records, instead of the format's own
    min_difficulty: float | None = None  # of DeepMath
    images: Path | None = None  # folder that relative paths of images are of; null: the folder of their file


class Format(Protocol):
    """Turns records as they were published into drafts."""

    columns: tuple[str, ...] | None  # that are read of a parquet file; null: all

    def __init__(self, options: FormatOptions) -> None: ...

    def draft(self, record: dict, folder: Path) -> Draft:
        """``folder`` holds the file. Raises Flaw for a record that cannot be used, Skip for one that is not wanted."""
        ...
