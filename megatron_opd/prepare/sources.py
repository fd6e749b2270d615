"""The rows of a published file: JSON lines, parquet, or one JSON array. None is in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_opd.data.rows import Row, check_file, read_rows, type_name
from megatron_opd.errors import DataError

CHUNK = 1 << 20  # characters
LONGEST = 1 << 28  # characters of one object: more is a broken file, of which not all is read into memory
_START = re.compile(r'\s*(?:\[|\{.*?"data"\s*:\s*\[)', re.DOTALL)  # an array, or {"dataset_name": ..., "data": [
_BETWEEN = re.compile(r"[\s,]*")


def source_rows(path: Path, columns: tuple[str, ...] | None) -> Iterator[Row]:
    """The rows of a .jsonl, .jsonl.gz, .parquet or .json file, in order. Raises DataError if it cannot be read."""
    if path.suffix != ".json":
        yield from read_rows(path, None if columns is None else list(columns))
        return
    check_file(path)
    try:
        with path.open(encoding="utf-8") as file:
            yield from _array(path, file)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("The file cannot be read", where=path, got=error) from error


def _array(path: Path, file: TextIO) -> Iterator[Row]:
    """The objects of the array; the number of a row is its place, from 1."""
    text = file.read(CHUNK)
    start = _START.match(text)
    if start is None:
        expected = 'an array of objects, or an object with such an array as "data"'
        fix = "rename the file to .jsonl if it has an object on each line"
        raise DataError("The JSON file is of another form", where=path, got=repr(text[:60]), expected=expected, fix=fix)
    decoder, position, number = json.JSONDecoder(), start.end(), 0
    while True:
        position = _BETWEEN.match(text, position).end()
        if text.startswith("]", position):
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            rest = len(text) - position
            more = file.read(max(CHUNK, rest)) if rest < LONGEST else ""  # doubles: a long object stays cheap
            if not more:
                raise DataError("The JSON file is broken", where=f"{path}, after row {number}", got=error) from error
            text, position = text[position:] + more, 0
            continue
        number += 1
        if not isinstance(value, dict):
            raise DataError("A row is no object", where=f"{path}, row {number}", got=type_name(value))
        yield Row(number, value)
