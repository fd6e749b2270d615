"""The endless order of the prompts of a file that is never in memory: a window of it is shuffled at a time.

    blocks of a megabyte, in the order of this epoch:   7 2 9 4 | 1 8 0 5 | 3 6
                                                        window 0  window 1  2
    drawn: the lines of window 0 in a seeded order, then those of window 1, ...

Of a parquet file, blocks are its row groups and lines its rows. Every line is drawn exactly once in an epoch (as often
as its ``repeats`` says). A cursor of three numbers (epoch, window, line) says where the stream is. Prompts become
tokens when they are drawn; a record that turns out to be unusable is passed over, told in the log with file and line,
and counted: too large a share of them ends the run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

import numpy as np

from megatron_opd.config import StreamConfig
from megatron_opd.data.blocks import LineBlocks
from megatron_opd.data.reading import PromptReader
from megatron_opd.data.row_groups import RowGroups
from megatron_opd.data.rows import Flaw, Row
from megatron_opd.errors import DataError
from megatron_opd.records import Outcome, Prompt

logger = logging.getLogger(__name__)

LEAST_DRAWN = 1000  # records that the share of bad ones is taken of, before so many are drawn


class FileStream:
    """All prompts of a file, or those of one domain; has what ``PromptStream`` has, but for what it learns of them."""

    def __init__(
        self,
        lines: LineBlocks | RowGroups,
        reader: PromptReader,
        seed: int,
        stream: StreamConfig,
        domain: str | None = None,
        *,
        takes_bad: bool = True,
    ) -> None:
        """``takes_bad``: draw records whose domain cannot be told, too; of several streams of a file only one does."""
        self._lines, self._reader, self._seed = lines, reader, seed % 2**64
        self._domain, self._takes_bad, self._max_bad_share = domain, takes_bad, stream.max_bad_share
        self._window_mb = stream.window_mb
        self._epoch, self._window, self._index = 0, 0, 0  # the cursor: the next line is _order[_index]
        self._drawn, self._bad = 0, 0
        self._windows = self._permuted(0)
        self._order: np.ndarray | None = None  # places of the window's lines, in the order of drawing; null: not read
        self._found = False  # any line in this epoch

    def take(self, count: int) -> list[Prompt]:
        """The next ``count`` prompts."""
        return [prompt for _, prompt in self.draw(count)]

    def draw(self, count: int) -> list[tuple[str, Prompt]]:
        """The same, each with the name that ``find`` takes. Raises DataError when too many records are bad."""
        drawn: list[tuple[str, Prompt]] = []
        while len(drawn) < count:
            row = self._lines.line(self._next())
            try:
                drawn.append((str(row.number), self._reader.prompt(row)))
                self._drawn += 1
            except Flaw as flaw:
                self._pass_over(row, flaw)
        return drawn

    def find(self, name: str) -> Prompt:
        """A prompt that was drawn before."""
        return self._reader.prompt(self._lines.line(int(name)))

    def observe(self, outcomes: Iterable[tuple[str, Outcome]]) -> None:
        """Nothing is remembered of outcomes: there may be more prompts than memory holds."""

    def known(self) -> None:
        """Pass counts are not kept."""

    def state(self) -> dict[str, np.ndarray]:
        """What ``restore`` of a stream of the same file and seed needs."""
        return {"cursor": np.array([self._epoch, self._window, self._index, self._drawn, self._bad])}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Go to a position. Raises DataError when the state is of another kind of stream."""
        cursor = state.get("cursor")
        if cursor is None or cursor.shape != (5,) or (cursor < 0).any():
            fix = "set data.stream, data.lazy and data.mixture as they were, or start anew with existing=archive"
            raise DataError("The saved position is of another kind of stream", got=", ".join(state), fix=fix)
        self._epoch, self._window, self._index, self._drawn, self._bad = cursor.tolist()
        self._windows, self._order, self._found = self._permuted(self._epoch), None, True

    def _next(self) -> int:
        """The place of the next line."""
        while self._order is None or self._index >= len(self._order):
            if self._order is not None:
                self._turn()
            self._order = self._read_window()
            self._found = self._found or len(self._order) > 0
        self._index += 1
        return int(self._order[self._index - 1])

    def _turn(self) -> None:
        """Go to the next window."""
        self._window, self._index = self._window + 1, 0
        if self._window < len(self._windows):
            return
        if not self._found:
            got, expected = f"no record of {self._domain or 'any domain'}", "at least one"
            fix = "correct data.mixture or the file"
            raise DataError("A domain has no prompts", where=self._lines.path, got=got, expected=expected, fix=fix)
        self._epoch, self._window, self._found = self._epoch + 1, 0, False
        self._windows = self._permuted(self._epoch)

    def _permuted(self, epoch: int) -> list[np.ndarray]:
        """The windows of an epoch: blocks that are shuffled together."""
        order = np.random.default_rng([self._seed, epoch]).permutation(len(self._lines))
        return self._lines.windows(order, self._window_mb)

    def _read_window(self) -> np.ndarray:
        places = [place for block in self._windows[self._window].tolist() for place in self._places(block)]
        seed = [self._seed, self._epoch, self._window + 1]
        return np.random.default_rng(seed).permutation(np.array(places, dtype=np.int64))

    def _places(self, block: int) -> Iterable[int]:
        """Places of a block's lines, each as often as this stream draws it in an epoch."""
        if self._domain is None and self._reader.columns.repeats is None:
            return self._lines.places(block)  # all that are there: no need to look
        return [place for row in self._lines.lines(block) for place in self._times(row)]

    def _times(self, row: Row) -> list[int]:
        """The place of a line, as often as this stream draws it in an epoch."""
        try:
            record = row.record()
            wanted = self._domain is None or self._reader.domain(record) == self._domain
            return [row.number] * (self._reader.repeats(record) if wanted else 0)
        except Flaw:
            return [row.number] * self._takes_bad

    def _pass_over(self, row: Row, flaw: Flaw) -> None:
        """Count a bad record. Raises DataError when there are too many."""
        self._bad += 1
        where = f"{self._lines.path}:{self._lines.line_number(row.number)}"
        logger.warning("a record cannot be used: %s: %s", where, flaw)
        seen = self._drawn + self._bad
        if self._bad > self._max_bad_share * max(seen, LEAST_DRAWN):
            raise DataError(
                f"A record cannot be used{': ' + flaw.field if flaw.field else ''}",
                where=where,
                got=f"{flaw.got} ({self._bad} bad of {seen} records so far)",
                expected=flaw.expected,
                fix=f"{flaw.fix}; or raise data.stream.max_bad_share",
            )
