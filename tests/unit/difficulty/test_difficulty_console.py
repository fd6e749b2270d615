"""What a person sees of a difficulty run, and what happens to it when its server dies."""

from __future__ import annotations

import asyncio
import io
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_opd.config import DifficultyConfig, load_config
from megatron_opd.data.pass_rates import PassRates
from megatron_opd.difficulty.command import Folder, _next_command
from megatron_opd.difficulty.console import DifficultyConsole
from megatron_opd.difficulty.weighing import weigh
from megatron_opd.errors import ProcessError
from megatron_opd.runtime.process import start
from megatron_opd.sampling.ask import _all_or_first_failure, _until_death
from megatron_opd.sampling.journal import Sampled

TOY = Path(__file__).resolve().parents[3] / "conf" / "toy.yaml"


def show(folder: Path, done: int, *, terminal: bool = False) -> str:
    """The output of a run on 40 prompts of which ``done`` were finished before."""
    output = io.StringIO()
    passes = np.array([0] * 24 + [1] * 4 + [2] * 12)
    full = np.full(40, 2)
    graded = np.where(np.arange(40) == 3, 1, full)
    rates = PassRates([str(i) for i in range(40)], ["math"] * 40, full, graded, passes, "m", {})
    options = DifficultyConfig(samples=2)
    with DifficultyConsole(Console(file=output, force_terminal=terminal, width=100)) as console:
        console.banner(load_config(TOY, ["difficulty.top_k=null"]), folder, done, 40)
        if done < 40:
            console.sampling(done, 40)
            for _ in range(40 - done):
                console.sampled()
        console.judged(
            [
                Sampled("a", [1, 0], [4, 3], [0, 1], -1),
                Sampled("b", [0, -1], [2, 3], [0, 0], -1, ["timed out after 5 s"]),
            ]
        )
        console.weighed(weigh(rates, options, 0)[1])
        console.result([("pass rates", folder / "pass_rates.parquet")], "megatron-opd train")
    return output.getvalue()


def test_a_log_gets_a_line_for_each_tenth(tmp_path: Path) -> None:
    text = show(tmp_path, done=0)
    assert "\x1b" not in text and text.count("sampled ") == 10
    assert "sampled 4/40 prompts (10 %)" in text and "sampled 40/40 prompts (100 %)" in text
    assert "going on" not in text and "temperature 1, top-p 0.95, top-k all" in text


def test_a_run_that_goes_on_says_so(tmp_path: Path) -> None:
    text = show(tmp_path, done=37)
    assert "going on: 37 of 40 prompts" in text and text.count("sampled ") == 1
    text = show(tmp_path, done=40)
    assert "the samples are complete" in text and "sampled " not in text and "engine" not in text


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    text = show(tmp_path, done=10, terminal=True)
    assert "40/40" in text and "\x1b" in text and "prompts/s" not in text


def test_the_histogram_is_a_table(tmp_path: Path) -> None:
    text = show(tmp_path, done=40)
    rows = [[cell.strip() for cell in line.split("\u2502")[1:-1]] for line in text.splitlines() if "\u2502" in line]
    assert [row[:4] for row in rows] == [["0", "23", "23", "23"], ["1", "4", "4", "4"], ["2", "12", "12", "12"]]
    assert "math: U-shaped, c = 1 .. 1 raised" in text
    assert "pass rate 35.4 %; 40 prompts, 40 appearances in an epoch (1.00 times as many); 1 with unknown" in text
    assert "4 responses, 12 tokens; 1 responses cut at the token limit; 1 of unknown outcome" in text
    assert "  1 x timed out after 5 s" in text


def test_the_next_command_keeps_the_users_changes() -> None:
    arguments = ["my conf.yaml", "name=a", "data.train=x.jsonl", "difficulty.samples=4", "data.columns.id=id"]
    expected = "megatron-opd train 'my conf.yaml' name=a data.columns.id=id data.train=out/weighted.jsonl"
    assert _next_command(arguments, Folder(Path("out"))) == f"{expected} data.columns.repeats=repeats"


@pytest.fixture
def ended() -> list[float]:
    """Which waits have come to an end."""
    return []


@pytest.fixture
def wait(ended: list[float]) -> Callable[[float], Coroutine]:
    """Waits, then fails."""

    async def wait(seconds: float) -> None:
        try:
            await asyncio.sleep(seconds)
            raise ProcessError("no verifier")
        finally:
            ended.append(seconds)

    return wait


async def test_the_death_of_the_server_ends_the_work(tmp_path: Path, wait, ended: list[float]) -> None:
    child = start("rollout", [sys.executable, "-c", "print('out of memory'); exit(3)"], {}, tmp_path / "rollout.log")
    with pytest.raises(ProcessError, match=r"rollout died(.|\n)*exit code 3(.|\n)*out of memory"):
        await _all_or_first_failure([wait(60), wait(70)], _until_death([child]))
    assert sorted(ended) == [60, 70]


async def test_one_failure_ends_the_others(wait, ended: list[float]) -> None:
    with pytest.raises(ProcessError, match="no verifier"):
        await _all_or_first_failure([wait(0.1), wait(60)], _until_death([]))
    assert sorted(ended) == [0.1, 60] and len(asyncio.all_tasks()) == 1


async def test_a_cancellation_ends_everything(wait, ended: list[float]) -> None:
    whole = asyncio.create_task(_all_or_first_failure([wait(50), wait(60)], _until_death([])))
    await asyncio.sleep(0.1)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole
    assert sorted(ended) == [50, 60] and len(asyncio.all_tasks()) == 1
