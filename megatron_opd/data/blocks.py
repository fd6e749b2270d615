"""A file of JSON lines as blocks of bytes: how many there are is known from its size, without reading it.

A line belongs to the block that its first byte is in, so every line is in exactly one block.

    block 0               block 1               block 2
    {"a": 1}\\n{"b": 2, ........ }\\n{"c": 3}\\n{"d": .......... }\\n
    ^         ^                     ^         ^                         places: byte offsets
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from megatron_opd.data.rows import Row, check_file
from megatron_opd.errors import DataError

BLOCK = 1 << 20  # bytes
_SAMPLES, _SAMPLE_BYTES = 64, 4096  # of a fingerprint


class LineBlocks:
    """The lines of a .jsonl file by their places."""

    def __init__(self, path: Path, block: int = BLOCK) -> None:
        """``block``: bytes. Raises DataError for a file that is not there, is empty, or has no lines to jump to."""
        check_file(path)
        if path.suffix != ".jsonl":
            expected = "a .jsonl or .parquet file: places in others cannot be jumped to"
            fix = "unpack it, convert it with megatron-opd prepare, or leave data.stream out"
            raise DataError("The prompt file cannot be streamed", where=path, got=path.name, expected=expected, fix=fix)
        self.path, self._block = path, block
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise DataError("The prompt file cannot be read", where=path.absolute(), got=error) from error
        self._size = os.fstat(self._file.fileno()).st_size
        if not self._size:
            raise DataError("The prompt file is empty", where=path, got="no records", expected="at least one")

    def __len__(self) -> int:
        """Blocks."""
        return (self._size + self._block - 1) // self._block

    def windows(self, order: np.ndarray, megabytes: int) -> list[np.ndarray]:
        """``order`` [len] of the blocks, cut where ``megabytes`` blocks, which is what they have, are full."""
        return np.split(order, range(megabytes, len(order), megabytes))

    def places(self, number: int) -> list[int]:
        """Those of all lines of a block."""
        return [row.number for row in self.lines(number)]

    def lines(self, number: int) -> list[Row]:
        """The lines that begin in a block; their numbers are places. A blank line at the end of the file is none."""
        begin, end = number * self._block, min((number + 1) * self._block, self._size)
        before = max(begin - 1, 0)  # the byte before the block says whether a line begins with it
        data = self._bytes(before, end - before)
        starts = (np.flatnonzero(np.frombuffer(data, dtype=np.uint8)[:-1] == ord("\n")) + 1).tolist()
        starts = starts if begin else [0, *starts]
        if not starts:
            return []
        ends = [*starts[1:], len(data)]
        rows = [Row(before + first, data[first:last]) for first, last in zip(starts, ends, strict=True)]
        if not rows[-1].content.endswith(b"\n"):
            rows[-1] = self.line(rows[-1].number)  # it goes on in the next block
        if end == self._size and not rows[-1].content.strip():
            rows.pop()
        return rows

    def line(self, place: int) -> Row:
        """The line that begins at a place."""
        parts, at = [], place
        while part := self._bytes(at, 1 << 16):
            head, newline, _ = part.partition(b"\n")
            parts.append(head + newline)
            if newline:
                break
            at += len(part)
        return Row(place, b"".join(parts))

    def line_number(self, place: int) -> int:
        """Counted from 1, by reading the file up to the place: for errors only."""
        lines, at = 1, 0
        while at < place:
            part = self._bytes(at, min(1 << 20, place - at))
            lines, at = lines + part.count(b"\n"), at + len(part)
        return lines

    def fingerprint(self) -> str:
        """``file_fingerprint`` of the file."""
        return file_fingerprint(self.path)

    def _bytes(self, place: int, count: int) -> bytes:
        """At most ``count`` bytes from a place on. Raises DataError."""
        try:
            return os.pread(self._file.fileno(), count, place)
        except OSError as error:
            raise DataError("The prompt file cannot be read", where=self.path, got=error) from error


def file_fingerprint(path: Path) -> str:
    """A hash of the size and of 64 pieces spread over a file: cheap, and it finds any file that was made anew.

    A change that keeps the size and lies between two pieces is not found. Raises DataError.
    """
    try:
        with path.open("rb", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            found = hashlib.blake2b(str(size).encode(), digest_size=16)
            for place in np.linspace(0, max(size - _SAMPLE_BYTES, 0), _SAMPLES).astype(int).tolist():
                found.update(os.pread(file.fileno(), _SAMPLE_BYTES, place))
    except OSError as error:
        raise DataError("The prompt file cannot be read", where=path, got=error) from error
    return found.hexdigest()
