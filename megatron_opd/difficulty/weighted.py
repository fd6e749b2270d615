"""The weighted prompt file: every record as it was, and how often it appears.

    {"prompt": "Compute 2 + 3.", "answer": 5, "domain": "math", "repeats": 2, "pass_rate": 0.25}

A line of JSON stays as it is, byte for byte, up to its closing bracket; a row of a parquet file becomes one, with all
its columns: dates as ISO text, decimal numbers as text.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from megatron_opd.data.rows import Row, read_rows
from megatron_opd.errors import DataError

REPEATS, PASS_RATE = "repeats", "pass_rate"


def check_convertible(source: Path) -> None:
    """Raise DataError when ``source`` has a column of ours already, or a value that JSON cannot hold."""
    for _ in _open_records(source):
        pass


def write_weighted(source: Path, target: Path, repeats: Sequence[int], pass_rates: Sequence[float | None]) -> None:
    """Write all records of ``source``, in order, with the two columns; ``target`` appears when it is complete.

    repeats, pass_rates: one for each record, in its order; a pass rate that is not known is null.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    with temporary.open("wb") as file:
        for record, times, rate in zip(_open_records(source), repeats, pass_rates, strict=True):
            file.write(record + f', "{REPEATS}": {times:d}, "{PASS_RATE}": {json.dumps(rate)}}}\n'.encode())
    temporary.rename(target)


def _open_records(source: Path) -> Iterator[bytes]:
    """Every record as JSON without its closing bracket."""
    for row in read_rows(source, None):
        record = row.record()
        _check_columns(source, row.number, record)
        yield _json(source, row, record).rstrip().removesuffix(b"}").rstrip()


def _check_columns(source: Path, number: int, record: dict) -> None:
    taken = [name for name in (REPEATS, PASS_RATE) if name in record]
    if taken:
        raise DataError(
            f"The prompt file has a column {taken[0]!r} already, which would be replaced",
            where=f"{source}:{number}",
            got=f"{taken[0]} = {record[taken[0]]!r}",
            expected=f"no column {REPEATS} or {PASS_RATE}",
            fix="take the file that this one was made from, or rename the column",
        )


def _json(source: Path, row: Row, record: dict) -> bytes:
    if isinstance(row.content, bytes):
        return row.content
    try:
        return json.dumps(record, default=_plain, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        fix = "leave the column out of the prompt file"
        raise DataError(
            "A row cannot be written as JSON", where=f"{source}:{row.number}", got=error, fix=fix
        ) from error


def _plain(value: object) -> object:
    """What JSON holds instead of ``value``. Raises TypeError when there is nothing."""
    if isinstance(value, datetime.date | datetime.time):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, Decimal):
        return int(value) if value.is_finite() and value == int(value) else str(value)
    raise TypeError(f"a value of type {type(value).__name__}")
