"""How often a model solved each prompt: a parquet file, written by ``megatron-opd difficulty`` and by training runs.

    prompt_id  domain  samples  graded  passes  model         settings
    gsm8k-17   math          8       8       3  models/4b     {"difficulty.temperature": 1.0, ...}
    gsm8k-18   math          8       7       0  models/4b     ...

``graded`` leaves out samples whose verifier failed: they are neither passes nor failures. ``model`` and ``settings``,
a JSON object, are the same in all rows, and stand in the file's key-value metadata too.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opd.errors import DataError

SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("domain", pa.string()),
        ("samples", pa.int64()),
        ("graded", pa.int64()),
        ("passes", pa.int64()),
        ("model", pa.string()),
        ("settings", pa.string()),
    ]
)
MADE_BY = "take a pass_rates.parquet that `megatron-opd difficulty` or a training run wrote"


@dataclass(frozen=True, eq=False)
class PassRates:
    """The content of one file: n prompts, in its order."""

    ids: list[str]  # [n], each once
    domains: list[str]  # [n]
    samples: np.ndarray  # [n] int64, responses that were drawn
    graded: np.ndarray  # [n] int64, 0 .. samples: responses with a known outcome
    passes: np.ndarray  # [n] int64, 0 .. graded
    model: str  # whose responses they are
    settings: dict[str, object]  # how they were drawn and judged

    @cached_property
    def index(self) -> dict[str, int]:
        """Prompt id to position."""
        return {name: position for position, name in enumerate(self.ids)}


def write_pass_rates(
    path: Path,
    ids: Sequence[str],
    domains: Sequence[str],
    samples: Sequence[int] | np.ndarray,
    graded: Sequence[int] | np.ndarray,
    passes: Sequence[int] | np.ndarray,
    model: str,
    settings: dict[str, object],
) -> None:
    """Write the file under a temporary name and rename it when it is complete: a reader sees all of it or the old one.

    One value a prompt in each sequence; ``settings`` must go into JSON.
    """
    described = json.dumps(settings, sort_keys=True)
    values = [ids, domains, samples, graded, passes, [model] * len(ids), [described] * len(ids)]
    columns = [pa.array(column, type=field.type) for column, field in zip(values, SCHEMA, strict=True)]
    table = pa.table(columns, schema=SCHEMA.with_metadata({"model": model, "settings": described}))
    temporary = path.with_name(f"{path.name}.tmp")
    pq.write_table(table, temporary, compression="zstd")
    temporary.rename(path)


def read_pass_rates(path: Path) -> PassRates:
    """The content of a file that ``write_pass_rates`` wrote. Raises DataError for any other."""
    if not path.is_file():
        raise DataError("No such file of pass rates", where=path.absolute(), fix=MADE_BY)
    try:
        table = _typed(path, pq.ParquetFile(path).read())  # not read_table, which takes a=b in a path for a column
    except (pa.ArrowException, OSError) as error:
        expected = f"parquet with the columns {', '.join(SCHEMA.names)}"
        raise DataError(
            "The pass rates cannot be read", where=path, got=error, expected=expected, fix=MADE_BY
        ) from error
    ids, counts = table["prompt_id"].to_pylist(), [table[name].to_numpy() for name in ("samples", "graded", "passes")]
    rates = PassRates(ids, table["domain"].to_pylist(), *counts, _only(path, table, "model"), _settings(path, table))
    _check_rows(path, rates)
    return rates


def _typed(path: Path, table: pa.Table) -> pa.Table:
    """The columns of SCHEMA, converted to its types where that loses nothing."""
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if missing:
        what, got = f"The pass rates have no column {missing[0]!r}", ", ".join(table.column_names)
        raise DataError(what, where=path, got=got, expected=", ".join(SCHEMA.names), fix=MADE_BY)
    table = table.select(SCHEMA.names).cast(SCHEMA)
    for name in SCHEMA.names:
        if nulls := table[name].null_count:
            raise DataError(f"The pass rates have no {name}", where=path, got=f"{nulls} nulls", expected="none")
    return table


def _only(path: Path, table: pa.Table, name: str) -> str:
    """The one value that a column has in all rows."""
    values = table[name].unique().to_pylist()
    if len(values) != 1:
        expected = f"one {name} in at least one row"
        raise DataError("The pass rates are not of one run", where=path, got=values[:3] or "no rows", expected=expected)
    return values[0]


def _settings(path: Path, table: pa.Table) -> dict[str, object]:
    text = _only(path, table, "settings")
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise DataError("The settings of the pass rates are no JSON", where=path, got=error) from error
    if not isinstance(settings, dict):
        raise DataError("The settings of the pass rates cannot be used", where=path, got=text, expected="a JSON object")
    return settings


def _check_rows(path: Path, rates: PassRates) -> None:
    wrong = np.flatnonzero((rates.passes < 0) | (rates.passes > rates.graded) | (rates.graded > rates.samples))
    if len(wrong):
        row = int(wrong[0])
        got = f"{rates.passes[row]} passes of {rates.graded[row]} graded of {rates.samples[row]} samples"
        where = f"{path}, prompt {rates.ids[row]}"
        raise DataError("These are no pass counts", where=where, got=got, expected="0 <= passes <= graded <= samples")
    if len(rates.index) < len(rates.ids):
        twice = next(name for position, name in enumerate(rates.ids) if rates.index[name] != position)
        raise DataError("A prompt has two pass rates", where=path, got=twice, expected="each prompt once")
