"""What a person sees of a difficulty run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from megatron_opd import __version__
from megatron_opd.config import Config
from megatron_opd.difficulty.journal import Sampled
from megatron_opd.difficulty.weighing import DomainWeights, name_of, raised_bins
from megatron_opd.observe.console import ProgressConsole

LINES = 10  # of progress in a log
BAR = 28  # characters of the longest bar in a table


class DifficultyConsole(ProgressConsole):
    """Prints one difficulty run: a bar on a terminal, a line for each tenth in a log."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._total = self._first = self._done = 0
        self._began = 0.0

    def banner(self, config: Config, folder: Path, done: int, total: int) -> None:
        """The facts that matter, before anything starts."""
        options, server = config.difficulty, config.rollout.server
        top_k = "all" if options.top_k is None else options.top_k
        self._say(f"megatron_opd {__version__}   difficulty of {config.data.train}")
        self._say(f"  student   {config.student.model}")
        self._say(
            f"  samples   {options.samples} of each of {total} prompts, temperature {options.temperature:g}, "
            f"top-p {options.top_p:g}, top-k {top_k}, at most {config.rollout.max_new_tokens} tokens"
        )
        if done < total:
            self._say(f"  engine    {', '.join(server.urls) or f'{server.replicas} SGLang server(s) of its own'}")
        self._say(f"  folder    {folder.absolute()}")
        if done == total:
            self._say("the samples are complete; only the weights are made again")
        elif done:
            self._say(f"going on: {done} of {total} prompts are in samples.jsonl already")

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
        """The run ends early."""
        self._say(f"{done} of {total} prompts are kept in samples.jsonl; the same command goes on from there")

    def judged(self, rows: Sequence[Sampled]) -> None:
        """All prompts are finished."""
        self._describe("sampled")
        responses, unknown = sum(len(row.outcomes) for row in rows), sum(len(row.unknown) for row in rows)
        self._say(
            f"{responses} responses, {sum(row.tokens for row in rows)} tokens; {sum(row.cut for row in rows)} "
            f"responses cut at the token limit; {unknown} of unknown outcome"
        )
        for reason, count in Counter(reason for row in rows for reason in row.unknown).most_common(3):
            self._say(f"  {count} x {reason}")

    def weighed(self, rows: Sequence[DomainWeights]) -> None:
        """A table for each domain, and a line that says what it means."""
        for row in rows:
            self._console.print(_table(row))
            self._say(_sentence(row))

    def result(self, files: Sequence[tuple[str, Path]], command: str) -> None:
        """Where everything is, and what to do next."""
        width = max(len(name) for name, _ in files)
        for name, path in files:
            self._say(f"{name:{width}}  {path.absolute()}")
        self._say(f"next: {command}")


def _table(row: DomainWeights) -> Table:
    samples, highest = len(row.counts) - 1, max(1, row.appearances.max())
    table = Table(title=f"{row.domain}: {name_of(row.shape)}, {raised_bins(row.raised)}", title_justify="left")
    table.add_column(f"passes of {samples}", justify="right")
    for column in ("prompts", "wanted", "appearances"):
        table.add_column(column, justify="right")
    table.add_column("prompts #, added +")
    for passes, (count, wanted, shown) in enumerate(zip(row.counts, row.target, row.appearances, strict=True)):
        before, after = (round(BAR * int(number) / int(highest)) for number in (count, shown))
        bar = "#" * before + "+" * (after - before)
        table.add_row(str(passes), str(count), str(wanted), str(shown), bar)
    return table


def _sentence(row: DomainWeights) -> str:
    rate = f"{100 * row.passes / row.graded:.1f} %" if row.graded else "unknown"
    alone = f"; {row.left_alone} with unknown outcomes were left alone" if row.left_alone else ""
    return (
        f"{row.domain}: pass rate {rate}; {row.prompts} prompts, {row.epoch} appearances in an epoch "
        f"({row.epoch / row.prompts:.2f} times as many){alone}"
    )
