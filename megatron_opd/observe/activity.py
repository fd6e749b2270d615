"""What a run does right now: one line in a file that is replaced, read by the console and the report.

A wait of minutes inside a step or an evaluation is seen there, without a line in ``events.jsonl`` for each response.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WRITE_EVERY_S = 0.5


@dataclass(frozen=True, slots=True)
class Doing:
    """A piece of work that takes a while."""

    what: str
    done: int
    total: int  # 0: not countable
    began: float  # seconds of the system's clock, as ``now``
    now: float  # when ``done`` was counted

    @property
    def left_s(self) -> float | None:
        """Estimated seconds to go, at the mean speed so far; None while nothing can be said."""
        if not 0 < self.done <= self.total:
            return None
        return (self.now - self.began) / self.done * (self.total - self.done)


class Activity:
    """The writing side; one process of a run has it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._what, self._done, self._total = "", 0, 0
        self._began = self._written = 0.0

    def begin(self, what: str, total: int = 0) -> None:
        """Something else is done from now on."""
        self._what, self._done, self._total, self._began = what, 0, total, time.time()
        self._write()

    def advance(self) -> None:
        """One more of ``total`` is done; not written more often than WRITE_EVERY_S."""
        self._done += 1
        if time.time() - self._written >= WRITE_EVERY_S:
            self._write()

    def _write(self) -> None:
        self._written = time.time()
        doing = Doing(self._what, self._done, self._total, self._began, self._written)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(asdict(doing)) + "\n")
        temporary.rename(self._path)


def read_activity(path: Path) -> Doing | None:
    """What the run said last; None before it said anything."""
    try:
        return Doing(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
