"""Files of records: JSON lines and parquet, as numbered rows."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
BATCH_ROWS = 256  # of a parquet file in memory at once: a row may hold an image
MOST_FLAWS_TOLD = 10
MISSING = object()  # a value of its own: a column may hold null


class Flaw(Exception):
    """What is wrong with one row; ``field`` is the column, or "" where the row as a whole is meant."""

    def __init__(self, field: str, got: object, expected: object, fix: str) -> None:
        super().__init__(f"{field + ': ' if field else ''}got {got}, expected {expected}")
        self.field, self.got, self.expected, self.fix = field, got, expected, fix


@dataclass(frozen=True, slots=True)
class Row:
    """One record of a file, perhaps not yet parsed."""

    number: int  # of the line, or of the row of a parquet file; both count from 1
    content: bytes | dict

    def record(self) -> dict:
        """Column to value. Raises Flaw if the line is not one JSON object."""
        return self.content if isinstance(self.content, dict) else _parse_line(self.content)


def read_rows(path: Path, columns: list[str] | None, optional: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a file in order; of a parquet file only ``columns`` and what it has of ``optional``, or all for None.

    Raises DataError if the file as a whole cannot be read, or lacks a column (parquet).
    """
    check_file(path)
    if path.name.endswith(".parquet"):
        yield from _parquet_rows(path, columns, optional)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _lines(path)
    else:
        raise DataError(
            "The prompt file has an unknown suffix",
            where=path,
            got="".join(path.suffixes) or "no suffix",
            expected=", ".join(SUFFIXES),
            fix="convert the file, or rename it if it is one of these",
        )


def check_file(path: Path) -> None:
    """Raise DataError unless there is a file, in folders that may be looked into."""
    try:
        found = path.is_file()
    except OSError as error:
        raise DataError("The prompt file cannot be read", where=path.absolute(), got=error) from error
    if not found:
        got = "a folder" if path.is_dir() else None
        raise DataError("No such prompt file", where=path.absolute(), got=got, fix="give the path of an existing file")


def _lines(path: Path) -> Iterator[Row]:
    """One after the other; a blank line at the end of the file is none."""
    held: Row | None = None
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if held is not None:
                    yield held
                held = Row(number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("The prompt file cannot be read", where=path, got=error) from error
    if held is not None and held.content.strip():
        yield held


def _parse_line(line: bytes) -> dict:
    expected, fix = "one JSON object", "repair the line, or remove it"
    if not line.strip():
        raise Flaw("", "a blank line", expected, fix)
    try:
        record = json.loads(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        raise Flaw("", f"byte {line[error.start]:#04x} at column {error.start + 1}", "UTF-8 text", fix) from error
    except json.JSONDecodeError as error:
        got = f"{error.msg} at column {error.colno}: {_excerpt(error.doc, error.pos)}"
        raise Flaw("", got, expected, fix) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or thousands of brackets
        raise Flaw("", error, expected, fix) from error
    if not isinstance(record, dict):
        raise Flaw("", type_name(record), expected, fix)
    return record


def _excerpt(text: str, position: int, width: int = 30) -> str:
    """The text around ``position``."""
    begin, end = max(0, position - width), position + width
    return ("..." if begin else "") + text[begin:end].rstrip() + ("..." if end < len(text) else "")


def _parquet_rows(path: Path, columns: list[str] | None, optional: tuple[str, ...]) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            check_columns(path, present, columns or [])
            if columns is not None:
                columns = [*columns, *(name for name in optional if name in present and name not in columns)]
            number = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield Row(number, record)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError("The prompt file cannot be read", where=path, got=error, expected="a parquet file") from error


def check_columns(path: Path, present: list[str], wanted: list[str]) -> None:
    """Raise DataError when a column that is wanted is not there."""
    missing = [column for column in wanted if column not in present]
    if missing:
        raise DataError(
            f"The prompt file has no column {missing[0]!r}",
            where=path,
            got=", ".join(present),
            expected=", ".join(wanted),
            fix="set data.columns to the names in the file, or give prepare the format that the file is of",
        )


def type_name(value: object) -> str:
    """How JSON calls the type of ``value``."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else type(value).__name__)


def show(value: object, limit: int = 60) -> str:
    """A value in an error: strings as they are, of the others the type too."""
    if value is MISSING:
        return "nothing"
    text = repr(value) if isinstance(value, str) else f"{type_name(value)}: {value!r}"
    text = "null" if value is None else text
    return text if len(text) <= limit else f"{text[:limit]}..."


def flaws_error(flaws: list[tuple[Path, int, Flaw]], where: Path, total: int) -> DataError:
    """One error for all flaws (file, row, what), of which the first ten are told; ``total`` rows were looked at."""
    path, number, flaw = flaws[0]
    if len(flaws) == 1:
        what = f"A record cannot be used{': ' + flaw.field if flaw.field else ''}"
        return DataError(what, where=f"{path}:{number}", got=flaw.got, expected=flaw.expected, fix=flaw.fix)
    told = [f"\n    {path}:{number}: {flaw}" for path, number, flaw in flaws[:MOST_FLAWS_TOLD]]
    more = [f"\n    ... and {len(flaws) - len(told)} more"] if len(flaws) > len(told) else []
    fixes = dict.fromkeys(flaw.fix for _, _, flaw in flaws[:MOST_FLAWS_TOLD])
    what = f"{len(flaws)} of {total} records cannot be used"
    return DataError(what, where=where, got="".join(told + more), fix="; ".join(fixes))
