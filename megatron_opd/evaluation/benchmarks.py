"""From benchmark files to prompts. A benchmark's name is the domain of its prompts and the first part of their ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import BenchmarkConfig, EvaluationConfig
from megatron_opd.data.images import ImageStore, open_store
from megatron_opd.data.reading import ImageReading, PromptReader, read_prompts
from megatron_opd.data.rows import Flaw, Row, read_rows
from megatron_opd.errors import ConfigError, DataError
from megatron_opd.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_benchmark(
    config: EvaluationConfig, name: str, tokenizer: PreTrainedTokenizerBase, model: Path
) -> list[Prompt]:
    """The problems of one benchmark, for the model of a folder. Raises DataError."""
    try:
        column = config.benchmarks[name].columns.images
        store = open_store(model, config.images_folder, config.images, column)
        return _read(name, config.benchmarks[name], tokenizer, config.max_prompt_tokens, store)[: config.limit]
    except (ConfigError, DataError) as error:
        error.where = f"{error.where} (benchmarks.{name})"
        if error.fix is not None:
            fix = error.fix.replace("data.columns", f"benchmarks.{name}.columns").replace("data.images", "images")
            error.fix = fix.replace("data.max_prompt_tokens", "max_prompt_tokens")
        raise


def _read(
    name: str,
    benchmark: BenchmarkConfig,
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    store: ImageStore | None,
) -> list[Prompt]:
    column = None if benchmark.domain is None else benchmark.columns.domain
    columns = benchmark.columns.model_copy(update={"repeats": None, "domain": column})
    present = {name} if column is None else _values(benchmark.file, column)
    wanted = benchmark.domain or name
    if wanted not in present:
        got = ", ".join(sorted(present)) or f"no value in {column}"
        raise DataError("No record is of the benchmark's domain", where=benchmark.file, got=got, expected=wanted)
    default = name if column is None else None
    images = ImageReading(store, frozenset(present)) if store else None
    reader = PromptReader(
        benchmark.file, columns, default, present, tokenizer, most_tokens, template=benchmark.template, images=images
    )
    prompts = read_prompts(reader)
    return [replace(item, domain=name, id=f"{name}/{item.id}") for item in prompts if item.domain == wanted]


def _values(path: Path, column: str) -> set[str]:
    """The texts in a column; rows that cannot be read are left to the reader, which tells of them."""
    return {value for row in read_rows(path, [column]) if isinstance(value := _value(row, column), str)}


def _value(row: Row, column: str) -> object:
    try:
        return row.record().get(column)
    except Flaw:
        return None
