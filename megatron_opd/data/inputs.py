"""The prompt files of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import ColumnsConfig, Config
from megatron_opd.data.reading import read_prompts
from megatron_opd.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and held-out prompts (empty without ``data.eval``). Raises DataError."""
    data, domains = config.data, set(config.teachers)

    def read(path: Path, columns: ColumnsConfig) -> list[Prompt]:
        return read_prompts(path, columns, data.default_domain, domains, tokenizer, data.max_prompt_tokens)

    held_out = read(data.eval, data.eval_columns or data.columns) if data.eval else []
    return read(data.train, data.columns), held_out
