"""What a person sees while responses are drawn."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from megatron_opd.observe.console import ProgressConsole
from megatron_opd.sampling.journal import Sampled

LINES = 10  # of progress in a log


class SamplingConsole(ProgressConsole):
    """A bar on a terminal, a line for each tenth in a log."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._total = self._first = self._done = 0
        self._began = 0.0

    def starting(self, log: Path) -> None:
        self._say(f"starting the rollout engine; its log: tail -F {log.absolute()}")

    def attached(self, url: str) -> None:
        self._say(f"waiting for {url} to answer")

    def note(self, text: str) -> None:
        self._say(f"note: {text}")

    def sampling(self, done: int, total: int) -> None:
        """Sampling begins, with ``done`` prompts finished before."""
        self._first = self._done = done
        self._total, self._began = total, time.monotonic()
        self._task = self._progress.add_task("sampling", total=total, completed=done)

    def sampled(self) -> None:
        """A prompt is finished."""
        self._done += 1
        self._progress.update(self._task, advance=1)
        tenth = self._done * LINES // self._total
        if self._console.is_terminal or tenth == (self._done - 1) * LINES // self._total:
            return
        elapsed = time.monotonic() - self._began
        speed = (self._done - self._first) / elapsed
        left = (self._total - self._done) / speed
        self._say(
            f"sampled {self._done}/{self._total} prompts ({100 * self._done / self._total:.0f} %) | "
            f"{elapsed:.0f} s | {speed:.1f} prompts/s | {left:.0f} s to go"
        )

    def kept(self, done: int, total: int) -> None:
        """The command ends early."""
        self._say(f"{done} of {total} prompts are kept in samples.jsonl; the same command goes on from there")

    def judged(self, rows: Sequence[Sampled]) -> None:
        """All prompts are finished."""
        self._describe("sampled")
        responses, unknown = sum(len(row.outcomes) for row in rows), sum(len(row.unknown) for row in rows)
        self._say(
            f"{responses} responses, {sum(sum(row.lengths) for row in rows)} tokens; "
            f"{sum(sum(row.cut) for row in rows)} responses cut at the token limit; {unknown} of unknown outcome"
        )
        for reason, count in Counter(reason for row in rows for reason in row.unknown).most_common(3):
            self._say(f"  {count} x {reason}")
