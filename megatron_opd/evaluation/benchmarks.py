"""From benchmark files to prompts. A benchmark's name is the domain of its prompts and the first part of their ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_opd.config import BenchmarkConfig, EvaluationConfig
from megatron_opd.data.reading import read_prompts
from megatron_opd.data.rows import Flaw, Row, read_rows
from megatron_opd.errors import DataError, OpdError, raise_together
from megatron_opd.records import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_benchmarks(config: EvaluationConfig, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The problems of all benchmarks. Raises OpdError: the one mistake, or a list of all."""
    prompts: list[Prompt] = []
    found: list[OpdError] = []
    for name, benchmark in config.benchmarks.items():
        try:
            prompts += _read(name, benchmark, tokenizer, config.max_prompt_tokens)[: config.limit]
        except DataError as error:
            error.where = f"{error.where} (benchmarks.{name})"
            error.fix = error.fix and error.fix.replace("data.columns", f"benchmarks.{name}.columns")
            found.append(error)
    raise_together(found)
    return prompts


def _read(name: str, benchmark: BenchmarkConfig, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> list[Prompt]:
    column = None if benchmark.domain is None else benchmark.columns.domain
    columns = benchmark.columns.model_copy(update={"repeats": None, "domain": column})
    present = {name} if column is None else _values(benchmark.file, column)
    wanted = benchmark.domain or name
    if wanted not in present:
        raise DataError(
            "No record is of the domain",
            where=benchmark.file,
            got=", ".join(sorted(present)) or "none",
            expected=wanted,
        )
    default = name if column is None else None
    prompts = read_prompts(benchmark.file, columns, default, present, tokenizer, most_tokens, benchmark.template)
    return [replace(item, domain=name, id=f"{name}/{item.id}") for item in prompts if item.domain == wanted]


def _values(path: Path, column: str) -> set[str]:
    """The texts in a column; rows that cannot be read are left to the reader, which tells of them."""
    return {value for row in read_rows(path, [column]) if isinstance(value := _value(row, column), str)}


def _value(row: Row, column: str) -> object:
    try:
        return row.record().get(column)
    except Flaw:
        return None
