"""What a format is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from megatron_opd.config import PrepareConfig
from megatron_opd.prepare.drafts import Draft


class Format(Protocol):
    """Turns records as they were published into drafts."""

    columns: tuple[str, ...] | None  # that are read of a parquet file; null: all

    def __init__(self, options: PrepareConfig) -> None: ...

    def draft(self, record: dict, folder: Path) -> Draft:
        """``folder`` holds the file. Raises Flaw for a record that cannot be used, Skip for one that is not wanted."""
        ...
