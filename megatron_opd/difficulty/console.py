"""What a person sees of a difficulty run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from megatron_opd import __version__
from megatron_opd.config import Config
from megatron_opd.difficulty.weighing import DomainWeights, name_of, raised_bins
from megatron_opd.sampling.console import SamplingConsole

BAR = 28  # characters of the longest bar in a table


class DifficultyConsole(SamplingConsole):
    """Prints one difficulty run."""

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
