"""The store of pass rates: what is written is read, and nothing else is taken for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_opd.data.pass_rates import read_pass_rates, write_pass_rates
from megatron_opd.errors import DataError

SETTINGS = {"difficulty.samples": 8, "difficulty.top_k": None, "data.train": "sha256 ab"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of three prompts."""
    path = tmp_path / "pass=rates.parquet"
    counts = ([8, 12, 8], np.array([8, 11, 0], dtype=np.int32), np.array([3, 11, 0]))
    write_pass_rates(path, ["a", "b", "c"], ["math", "code", "math"], *counts, "models/4b", SETTINGS)
    return path


def changed(path: Path, **columns: list) -> Path:
    """The store with other columns, and without the metadata, as another tool would write it."""
    table = pq.ParquetFile(path).read().to_pydict() | columns
    pq.write_table(pa.table({name: values for name, values in table.items() if values is not None}), path)
    return path


def test_what_is_written_is_read(path: Path) -> None:
    rates = read_pass_rates(path)
    assert (rates.ids, rates.domains) == (["a", "b", "c"], ["math", "code", "math"])
    assert [array.tolist() for array in (rates.samples, rates.graded, rates.passes)] == [
        [8, 12, 8],
        [8, 11, 0],
        [3, 11, 0],
    ]
    assert all(array.dtype == np.int64 for array in (rates.samples, rates.graded, rates.passes))
    assert (rates.model, rates.settings, rates.index) == ("models/4b", SETTINGS, {"a": 0, "b": 1, "c": 2})
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_model_and_settings_are_columns_and_metadata(path: Path) -> None:
    file = pq.ParquetFile(path)
    names = ["prompt_id", "domain", "samples", "graded", "passes", "model", "settings"]
    assert file.schema_arrow.names == names and set(file.read()["model"].to_pylist()) == {"models/4b"}
    assert (
        file.schema_arrow.metadata[b"model"] == b"models/4b"
        and b"difficulty.top_k" in (file.schema_arrow.metadata[b"settings"])
    )


def test_another_tool_may_have_written_it(path: Path) -> None:
    before, after = read_pass_rates(path), read_pass_rates(changed(path))
    assert after.ids == before.ids and after.settings == SETTINGS and (after.passes == before.passes).all()


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"passes": None}, "no column 'passes'"),
        ({"passes": [3, None, 0]}, "no passes"),
        ({"passes": ["many", "11", "0"]}, "cannot be read"),
        ({"passes": [3.5, 11.0, 0.0]}, "cannot be read"),
        ({"passes": [3, 12, 0]}, "12 passes of 11 graded of 12 samples"),
        ({"passes": [-1, 11, 0]}, "prompt a"),
        ({"graded": [9, 11, 0]}, "3 passes of 9 graded of 8 samples"),
        ({"prompt_id": ["a", "b", "a"]}, "two pass rates"),
        ({"model": ["x", "y", "x"]}, "not of one run"),
        ({"settings": ["{", "{", "{"]}, "no JSON"),
        ({"settings": ["[]", "[]", "[]"]}, "a JSON object"),
    ],
)
def test_a_malformed_store_is_refused(path: Path, columns: dict, said: str) -> None:
    with pytest.raises(DataError, match=said) as caught:
        read_pass_rates(changed(path, **columns))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"PAR1 not parquet at all"])
def test_no_store_at_all(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "none.parquet"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"none\.parquet(.|\n)*megatron-opd difficulty"):
        read_pass_rates(path)


def test_a_store_without_rows_is_refused(path: Path) -> None:
    write_pass_rates(path, [], [], [], [], [], "m", {})
    with pytest.raises(DataError, match="no rows"):
        read_pass_rates(path)
