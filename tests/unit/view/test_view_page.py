"""The report: what is on the page at each state of a run, that no text becomes markup, and how a browser shows it."""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import opened
from trajectories import MARKUP
from typer.testing import CliRunner

from megatron_opd.audit.read import read_rollouts, trajectory_files
from megatron_opd.cli import app
from megatron_opd.config import Config
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.recorder import Recorder
from megatron_opd.observe.trajectories import SCHEMA, read_trajectories
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.view.browse import ROLLOUTS, pick
from megatron_opd.view.report import view


@pytest.fixture(scope="module")
def page(told: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    view(told.run_dir, tmp_path_factory.mktemp("page") / "deep")
    return next(tmp_path_factory.getbasetemp().glob("page*/deep/view.html"))


@pytest.fixture
def copied(told: Config, tmp_path: Path) -> RunDirectory:
    """The same run in a folder that may be changed."""
    shutil.copytree(told.run_dir, tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def recorder(run: RunDirectory) -> Recorder:
    return Recorder(run.events, run.metrics)


def shown(run: RunDirectory) -> str:
    """The page without markup, spaces as one."""
    view(run.path)
    text = re.sub(r"<style>.*</style>|<[^>]*>", " ", (run.path / "view.html").read_text(), flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


def test_a_run_that_was_killed_says_so(told: Config, tmp_path: Path) -> None:
    assert view(told.run_dir, tmp_path)[0].startswith("Ended without a word after 9 of 9 steps")


def test_a_run_that_goes_on_says_what_it_does(copied: RunDirectory) -> None:
    activity = Activity(copied.activity)
    activity.begin("step 10: rollouts", 32)
    copied.metrics.write_text(copied.metrics.read_text() + '{"step": 10, "opd/g')  # is being written
    with (copied.path / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        text = shown(copied)
    assert "Running: 9 of 9 steps; step 10: rollouts 0 of 32" in text and "The run goes on" in text


def test_a_failure_comes_first_with_its_log(copied: RunDirectory) -> None:
    (copied.logs / "student.log").write_text("first line\n" * 30 + f"the end {MARKUP}\n")
    recorder(copied).event("failed", role="student", error="Loss is not finite\n  got:  nan")
    recorder(copied).event("failed", role="supervisor", error="student stopped the run")
    text = shown(copied)
    assert "Failed after 9 of 9 steps" in text and "got: nan" in text and "the end &lt;script" in text
    assert text.index("Loss is not finite") < text.index("Facts", text.index("Files") + 5)
    assert "supervisor" not in text[: text.index("Calibration", text.index("Curves") + 300)]


def test_a_run_that_was_resumed_after_a_failure_has_not_failed(copied: RunDirectory) -> None:
    recorder(copied).event("failed", role="student", error="x")
    recorder(copied).event("resumed", step=5, damaged=["iter_0000007: truncated"])
    recorder(copied).event("stopped", signal="SIGTERM")
    text = shown(copied)
    assert (
        "Stopped by SIGTERM after 9 of 9 steps" in text
        and 'id="failure"' not in (copied.path / "view.html").read_text()
    )
    assert "damaged: iter_0000007: truncated" in text and "student failed" in text  # in the list of faults


def test_a_run_that_has_just_begun_has_a_page(copied: RunDirectory) -> None:
    for path in (copied.events, copied.metrics):
        path.unlink()
    shutil.rmtree(copied.trajectories)
    text = shown(copied)
    for said in (
        "No step is finished yet",
        "Nothing was evaluated",
        "No step has left its times",
        "trajectories_every",
    ):
        assert said in text


def test_numbers_are_those_that_were_recorded(page: Path, told: Config) -> None:
    text = page.read_text()
    last = json.loads(RunDirectory(told.run_dir).metrics.read_text().splitlines()[-1])
    assert f"math {100 * last['reward/correct/math']:.3g} %" in text  # under the pointer
    assert "25.0 % (3.1)" in text and "94.0 % (1.2)" in text and "64 of 90 groups" in text
    assert "calibration.max_shift" in text and "<code>1.0</code>" in text  # differs from the default
    assert "steps 1, 5, 9" in re.sub(r"\s+", " ", text)


def test_the_page_needs_nothing_else_and_runs_nothing(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in text
    assert not re.search(
        r"<(script|link|img|iframe|object|base)\b|\bon\w+=|url\(|@import|src=", text.split("<body>")[0]
    )
    assert not re.search(r"<(script|link|img|iframe|object|base)\b", text)
    assert all(link.startswith("#") for link in re.findall(r'href="([^"]*)"', text))


def test_no_text_becomes_markup(copied: RunDirectory) -> None:
    rows = read_trajectories(copied.trajectories).to_pylist()
    texts = {"prompt", "answer", "response", "reason", "prompt_id", "domain"}
    rows = [row | {name: f"</pre></i>{MARKUP}\x00\u202e{name}" for name in texts} for row in rows]
    shutil.rmtree(copied.trajectories)
    copied.trajectories.mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), copied.trajectories / "step_000001.parquet")
    recorder(copied).event("dropped", step=9, reasons=[MARKUP])
    recorder(copied).step(10, {f"opd/gap/{MARKUP}": 1.0, MARKUP: 2.0})
    view(copied.path)
    text = (copied.path / "view.html").read_text()
    assert "<script" not in text.lower() and "\x00" not in text and "\u202e" not in text
    assert "<b onmouseover" not in text and text.count("&lt;script&gt;") > ROLLOUTS


def test_what_is_shown_is_bounded_and_of_every_kind(told: Config) -> None:
    rollouts = read_rollouts(trajectory_files(told.run_dir / "trajectories"))
    picked = pick(rollouts, ROLLOUTS)
    assert len(picked) == len(set(picked)) == ROLLOUTS
    chosen = rollouts.take(np.array(pick(rollouts, 400)))
    for name in ("domain", "outcome", "state", "step"):
        assert set(getattr(chosen, name)) == set(getattr(rollouts, name))


def test_the_verb_tells_what_is_wrong(told: Config, tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["view", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "No such run folder" in missing.output
    (tmp_path / "taken").write_text("")
    taken = CliRunner().invoke(app, ["view", str(told.run_dir), "--out", str(tmp_path / "taken")])
    assert taken.exit_code == 1 and "The page cannot be written" in taken.output


async def test_a_browser_shows_values_filters_and_both_calibrations(page: Path, tmp_path: Path) -> None:
    async with opened(page, tmp_path / "profile") as tab:
        visible = "[...document.querySelectorAll('.rollout')].filter(e => e.offsetParent !== null)"
        assert await tab.ask(f"{visible}.length") == ROLLOUTS
        await tab.ask("document.querySelector('#outcome-o0').click()")
        assert await tab.ask(f"{visible}.every(e => e.innerText.includes('wrong'))")
        assert 0 < await tab.ask(f"{visible}.length") < ROLLOUTS
        await tab.ask("document.querySelector('#outcome-all').click()")

        colours = "[...document.querySelectorAll('.heat i')].map(e => getComputedStyle(e).backgroundColor).join()"
        before = await tab.ask(colours)
        await tab.ask("document.querySelector('#shade-after').click()")
        assert await tab.ask(colours) != before

        tip = "document.querySelector('#curves .at .tip')"
        assert await tab.ask(f"getComputedStyle({tip}).visibility") == "hidden"
        await tab.point_at("#curves .at .strip")
        assert await tab.ask(f"getComputedStyle({tip}).visibility") == "visible"
        assert "step 1" in await tab.ask(f"{tip}.textContent")
        unnamed = "[...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length"
        assert await tab.ask(unnamed) == 0
        await tab.picture(tmp_path / "wide.png")

        await tab.dark()
        assert await tab.ask("getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 31)"
        await tab.open(page, 390, 844)
        assert await tab.ask("document.documentElement.scrollWidth") <= 390  # nothing runs out of the page
        await tab.picture(tmp_path / "small.png")
        assert tab.complaints == []
