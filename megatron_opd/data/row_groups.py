"""A parquet file as the row groups it was written in, of which only some are in memory.

    group 0         group 1         group 2
    rows 1 .. 1000  rows 1001 ..    rows 2001 ..                        places: rows, counted from 1

Rows cannot be read one by one: the groups of the window that is drawn from stay in memory, as Arrow has them, and
nothing else does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.data.blocks import file_fingerprint
from megatron_opd.data.rows import BATCH_ROWS, Row, check_columns, check_file
from megatron_opd.errors import DataError

if TYPE_CHECKING:
    import pyarrow

MEGABYTE = 1 << 20


class RowGroups:
    """The rows of a .parquet file by their places; has what ``LineBlocks`` has."""

    def __init__(self, path: Path, columns: list[str], megabytes: int) -> None:
        """``columns``: those that are read; ``megabytes``: most of them in memory, unpacked.

        Raises DataError for a file that is not there, is none, is empty, or has a row group that does not fit.
        """
        import pyarrow
        from pyarrow import parquet

        check_file(path)
        self.path, self._columns, self._most = path, columns, megabytes * MEGABYTE
        try:
            self._file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                "The prompt file cannot be read", where=path, got=error, expected="a parquet file"
            ) from error
        check_columns(path, self._file.schema_arrow.names, columns)
        groups = [self._file.metadata.row_group(number) for number in range(self._file.num_row_groups)]
        self._first = np.cumsum([1, *(group.num_rows for group in groups)])  # [groups + 1] place of each group's first
        self._bytes = [_unpacked(group, columns) for group in groups]
        if self._first[-1] == 1:
            raise DataError("The prompt file is empty", where=path, got="no records", expected="at least one")
        self._check_sizes()
        self._held: OrderedDict[int, pyarrow.Table] = OrderedDict()  # the one used last comes last

    def __len__(self) -> int:
        """Row groups."""
        return len(self._bytes)

    def windows(self, order: np.ndarray, megabytes: int) -> list[np.ndarray]:
        """``order`` [len] of the groups, cut before each one that would not fit in ``megabytes`` any more."""
        cuts, size = [], 0
        for position, number in enumerate(order.tolist()):
            size += self._bytes[number]
            if size > megabytes * MEGABYTE and position:
                cuts.append(position)
                size = self._bytes[number]
        return np.split(order, cuts)

    def places(self, number: int) -> range:
        """Those of all rows of a group."""
        return range(int(self._first[number]), int(self._first[number + 1]))

    def lines(self, number: int) -> Iterator[Row]:
        """The rows of a group."""
        place = self.places(number).start
        for batch in self._group(number).to_batches(max_chunksize=BATCH_ROWS):
            for record in batch.to_pylist():
                yield Row(place, record)
                place += 1

    def line(self, place: int) -> Row:
        """One row."""
        number = int(np.searchsorted(self._first, place, side="right")) - 1
        (record,) = self._group(number).slice(place - self.places(number).start, 1).to_pylist()
        return Row(place, record)

    def line_number(self, place: int) -> int:
        """The row, counted from 1."""
        return place

    def fingerprint(self) -> str:
        """``file_fingerprint`` of the file, whose end describes all groups."""
        return file_fingerprint(self.path)

    def _group(self, number: int) -> pyarrow.Table:
        """Raises DataError."""
        import pyarrow

        if number in self._held:
            self._held.move_to_end(number)
            return self._held[number]
        while self._held and sum(self._bytes[held] for held in (*self._held, number)) > self._most:
            self._held.popitem(last=False)
        try:
            self._held[number] = self._file.read_row_group(number, columns=self._columns)
        except (pyarrow.ArrowException, OSError) as error:
            where = f"{self.path}, row group {number}"
            raise DataError("The prompt file cannot be read", where=where, got=error) from error
        return self._held[number]

    def _check_sizes(self) -> None:
        largest = int(np.argmax(self._bytes))
        if self._bytes[largest] > self._most:
            needed = -(-self._bytes[largest] // MEGABYTE)
            raise DataError(
                "A row group of the prompt file is too large to be streamed",
                where=f"{self.path}, row group {largest}",
                got=f"{needed} MB unpacked",
                expected=f"at most data.stream.window_mb, {self._most // MEGABYTE}",
                fix=f"set data.stream.window_mb={needed}, which is memory, or write the file in smaller row groups",
            )


def _unpacked(group: pyarrow.RowGroupMetaData, columns: list[str]) -> int:
    """Bytes of ``columns`` in a row group."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
