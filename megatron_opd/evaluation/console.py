"""What a person sees of an evaluation, and of the comparison of two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from megatron_opd import __version__
from megatron_opd.config import EvaluationConfig
from megatron_opd.evaluation.compare import Comparison
from megatron_opd.evaluation.results import Scores
from megatron_opd.evaluation.statistics import LEVEL, Estimate
from megatron_opd.sampling.console import SamplingConsole

INTERVAL = f"{100 * LEVEL:.0f} %"
NOTHING = "-"


class EvaluationConsole(SamplingConsole):
    """Prints one evaluation."""

    def banner(
        self, config: EvaluationConfig, model: Path, folder: Path, done: int, problems: Mapping[str, int]
    ) -> None:
        """The facts that matter, before anything starts. problems: of each benchmark."""
        total = sum(problems.values())
        self._say(f"megatron_opd {__version__}   evaluation of {model}")
        for name, benchmark in config.benchmarks.items():
            top_k = "" if benchmark.top_k is None else f", top-k {benchmark.top_k}"
            asked = ", asked as the file has it" if benchmark.template is None else ""
            self._say(
                f"  {name}: {benchmark.samples} of each of {problems[name]} problems, temperature "
                f"{benchmark.temperature:g}, top-p {benchmark.top_p:g}{top_k}, at most "
                f"{benchmark.max_new_tokens} tokens, verifier {benchmark.verifier}{asked}"
            )
        if done < total:
            server = config.server
            self._say(f"  engine    {', '.join(server.urls) or f'{server.replicas} SGLang server(s) of its own'}")
        self._say(f"  folder    {folder.absolute()}")
        if done == total:
            self._say("the responses are complete; only the numbers are made again")
        elif done:
            self._say(f"going on: {done} of {total} problems are in samples.jsonl already")

    def scores(self, found: Mapping[str, Scores]) -> None:
        """A row for each benchmark."""
        table = _table("m x n", "avg (s.e.)", INTERVAL, "pass@k", "tokens", "cut", "unknown")
        for name, scores in found.items():
            most = max(scores.pass_at, default=None)
            table.add_row(
                name,
                f"{scores.problems} x {scores.samples}",
                f"{_percent(scores.accuracy)} ({_error(scores.accuracy)})",
                _interval(scores.accuracy),
                NOTHING if most is None else f"{_percent(scores.pass_at[most])} @{most}",
                f"{scores.length:.0f}",
                f"{100 * scores.cut:.1f}",
                f"{100 * scores.unknown:.1f}",
            )
        self._console.print(table)

    def files(self, paths: Sequence[Path]) -> None:
        """Where everything is."""
        for path in paths:
            self._say(str(path.absolute()))

    def comparison(self, names: tuple[str, str], found: Mapping[str, Comparison], notes: Sequence[str]) -> None:
        """A row for each benchmark, and what was not done alike."""
        self._say(f"A = {names[0]}\nB = {names[1]}")
        for note in notes:
            self._warn(f"not done alike: {note}")
        table = _table("m", "A", "B", "B - A (s.e.)", INTERVAL, "p", "won:lost")
        for name, row in found.items():
            table.add_row(name, *_comparison_cells(row))
        self._console.print(table)
        for name, row in found.items():
            if row.left_out:
                self._warn(f"{name}: {row.left_out} problems are left out, which one of the two could not be graded on")


def _table(*columns: str) -> Table:
    """Narrow enough for a terminal of 80 characters; m problems, n responses of each."""
    table = Table(
        title="per cent of responses that are correct",
        title_justify="left",
        box=None,
        padding=(0, 0, 0, 2),
        pad_edge=False,
    )
    table.add_column("benchmark", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _comparison_cells(row: Comparison) -> list[str]:
    gap = row.difference
    if gap is None:
        return ["0", *[NOTHING] * 6]
    mean = gap.estimate
    return [
        str(mean.problems),
        f"{100 * row.first:.1f}",
        f"{100 * row.second:.1f}",
        f"{100 * mean.value:+.1f} ({_error(mean)})",
        _interval(mean),
        f"{'' if gap.exact else '~'}{gap.p_value:{'.4f' if gap.p_value >= 1e-4 else '.0e'}}",
        f"{gap.better}:{gap.worse}",
    ]


def _percent(value: Estimate | None) -> str:
    return NOTHING if value is None else f"{100 * value.value:.1f}"


def _error(value: Estimate | None) -> str:
    return NOTHING if value is None or value.standard_error is None else f"{100 * value.standard_error:.1f}"


def _interval(value: Estimate | None) -> str:
    return NOTHING if value is None else f"{100 * value.low:.1f}..{100 * value.high:.1f}"
