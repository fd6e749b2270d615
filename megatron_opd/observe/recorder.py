"""What a run leaves behind while it runs: events for the console, numbers for the plots."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TextIO

from megatron_opd.errors import OpdError


class Listener(Protocol):
    """Somebody else who wants the numbers of each step; must return at once and not raise."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of a finished step, as in ``metrics.jsonl``, or of an evaluation after it."""


class Recorder:
    """Appends one JSON object a line; each line is flushed, so another process can follow the file."""

    def __init__(self, events: Path, metrics: Path) -> None:
        self._events, self._metrics = events, metrics
        self._listeners: list[Listener] = []
        self._one_at_a_time = threading.Lock()  # sinks tell from threads of their own

    def listen(self, listener: Listener) -> None:
        """From now on ``listener`` gets the numbers of each step too."""
        self._listeners.append(listener)

    def event(self, kind: str, **facts: object) -> None:
        """Something happened: ``kind`` names it, ``facts`` are plain values."""
        self._append(self._events, {"time": round(time.time(), 3), "event": kind, **facts})

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of a finished step, also shown on the console."""
        self._append(self._metrics, {"step": step, **metrics})
        self.event("step", step=step, metrics=metrics)
        self._pass_on(step, metrics)

    def evaluated(
        self,
        step: int,
        when: str,
        accuracy: dict[str, float | None],
        standard_error: dict[str, float | None],
        weights: tuple[int, int],
    ) -> None:
        """Accuracy by domain after ``step`` steps; when: "before", "during", "after", or "teacher <domain>".

        weights: oldest and newest version that drew a token; -1 of a server that was never refreshed.
        """
        facts = {"accuracy": accuracy, "standard_error": standard_error, "weights": weights}
        self.event("evaluated", when=when, step=step, **facts)
        known = {domain: value for domain, value in accuracy.items() if value is not None}
        self._pass_on(step, {f"eval/{when.split()[0]}/{domain}": value for domain, value in known.items()})

    def _pass_on(self, step: int, metrics: dict[str, float]) -> None:
        for listener in self._listeners:
            listener.step(step, metrics)

    def _append(self, path: Path, row: dict) -> None:
        with self._one_at_a_time, path.open("a") as file:
            file.write(json.dumps(row) + "\n")


@contextmanager
def tell_failures(role: str, recorder: Recorder) -> Iterator[None]:
    """Leave an OpdError as an event for the supervisor to show, then go on raising it."""
    try:
        yield
    except OpdError as error:
        recorder.event("failed", role=role, error=str(error))
        raise


def follow(file: TextIO) -> Iterator[dict]:
    """Events written since the last call; a line that is still being written is left for the next one."""
    while True:
        start = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(start)
            return
        yield json.loads(line)


def read_events(path: Path) -> list[dict]:
    """All events of a run so far."""
    with path.open() as file:
        return list(follow(file))
