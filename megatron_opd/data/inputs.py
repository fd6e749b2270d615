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
    return read_training(config, tokenizer), read_held_out(config, tokenizer)


def read_training(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Training prompts only. Raises DataError."""
    return _read(config, config.data.train, config.data.columns, tokenizer)


def read_held_out(config: Config, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Held-out prompts only; none without ``data.eval``. Raises DataError."""
    data = config.data
    once = (data.eval_columns or data.columns).model_copy(update={"repeats": None})  # repeats belong to training
    return _read(config, data.eval, once, tokenizer) if data.eval else []


def _read(config: Config, path: Path, columns: ColumnsConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    data, domains = config.data, set(config.teachers)
    return read_prompts(path, columns, data.default_domain, domains, tokenizer, data.max_prompt_tokens)
