"""``megatron-opd difficulty`` with a real server: nothing lost or counted twice, and what it writes is trained on."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_opd.data.pass_rates import read_pass_rates

from runs import COMMAND, GONE_LIMIT_S, ROOT, TOY, Run, Servers, assert_all_gone, finish, starting

PROMPTS, SAMPLES = 40, 4
TRAIN = ROOT / "tools/toy/data/train.jsonl"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Every fiftieth prompt of the toy world."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in TRAIN.read_text().splitlines()[::50]))
    return path


@pytest.fixture
def run_difficulty(servers: Servers, prompts: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start the command on ``prompts`` and the shared server; it is killed after the test."""
    with starting(tmp_path) as begin:

        def estimate(*overrides: str) -> Run:
            asked = [f"data.train={prompts}", f"difficulty.samples={SAMPLES}", f"difficulty.output={tmp_path / 'out'}"]
            asked.append(f"rollout.server.urls=[{servers.rollout}]")
            return begin(tmp_path / "out", "difficulty", str(TOY), *asked, *overrides)

        yield estimate


def lines_of(run: Run) -> list[dict]:
    """The finished prompts in the journal; a line that is still being written is none."""
    path = run.folder / "samples.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return [json.loads(line) for line in content.split(b"\n")[:-1]][1:]


def wait_for_lines(run: Run, count: int) -> None:
    deadline = time.monotonic() + 120
    while len(lines_of(run)) < count:
        assert run.process.poll() is None and time.monotonic() < deadline, run.text()
        time.sleep(0.02)


def test_a_run_that_is_killed_goes_on_and_its_file_is_trained_on(
    servers: Servers, run_difficulty, run_train, prompts: Path
) -> None:
    killed = run_difficulty("difficulty.concurrency=2")
    wait_for_lines(killed, 8)
    family = list(killed.family().values())
    killed.process.kill()
    killed.process.wait()
    assert_all_gone(family)
    kept = lines_of(killed)
    assert 8 <= len(kept) < PROMPTS and not (killed.folder / "pass_rates.parquet").exists()

    interrupted = run_difficulty("difficulty.concurrency=2")
    wait_for_lines(interrupted, len(kept) + 4)
    family = list(interrupted.family().values())
    interrupted.process.terminate()
    assert_all_gone(family)
    assert interrupted.process.wait(GONE_LIMIT_S) == 128 + 15
    assert "the same command goes on from there" in interrupted.text() and "error: SIGTERM" in interrupted.text()
    kept_then = lines_of(interrupted)
    assert kept_then[: len(kept)] == kept and len(kept) < len(kept_then) < PROMPTS

    other = run_difficulty("difficulty.temperature=0.5")
    assert finish(other) == 1
    assert "difficulty.temperature = 0.5" in other.text() and "difficulty.temperature = 1.0" in other.text()

    resumed = run_difficulty()
    assert finish(resumed) == 0, resumed.text()
    assert f"going on: {len(kept_then)} of {PROMPTS} prompts" in resumed.text()
    rows = lines_of(resumed)
    assert rows[: len(kept_then)] == kept_then
    ids = [f"prompts.jsonl:{number}" for number in range(1, PROMPTS + 1)]
    assert sorted(row["id"] for row in rows) == sorted(ids)
    assert all(len(row["outcomes"]) == SAMPLES and sum(row["lengths"]) >= SAMPLES for row in rows)
    check_files(resumed.folder, prompts, {row["id"]: row["outcomes"] for row in rows})

    again = run_difficulty("difficulty.max_repeats=1")
    assert finish(again) == 0, again.text()
    assert "the samples are complete" in again.text() and lines_of(again) == rows
    weighted = resumed.folder / "weighted.jsonl"
    assert {json.loads(line)["repeats"] for line in weighted.read_text().splitlines()} == {1}

    train = run_train(
        "weighted",
        *(*servers.attach(), f"data.train={weighted}", "data.columns.repeats=repeats", "data.eval=null", "steps=1"),
        *("rollout.prompts_per_step=4", "rollout.samples_per_prompt=2"),
    )
    assert finish(train) == 0, train.text()
    assert len(train.metrics()) == 1


def check_files(folder: Path, prompts: Path, outcomes: dict[str, list[int]]) -> None:
    """The store and the weighted file say what the journal says, of every prompt."""
    rates = read_pass_rates(folder / "pass_rates.parquet")
    assert rates.model == "tools/toy/models/student" and rates.settings["difficulty.samples"] == SAMPLES
    assert rates.samples.tolist() == [SAMPLES] * PROMPTS
    assert rates.passes.tolist() == [outcomes[name].count(1) for name in rates.ids]
    assert rates.graded.tolist() == [SAMPLES - outcomes[name].count(-1) for name in rates.ids]
    assert 0 < rates.passes.sum() < rates.graded.sum()
    lines = [json.loads(line) for line in (folder / "weighted.jsonl").read_text().splitlines()]
    assert all(1 <= line.pop("repeats") <= 4 for line in lines)
    rest = [line.pop("pass_rate") for line in lines]
    assert rest == (rates.passes / rates.graded).tolist()
    assert lines == [json.loads(line) for line in prompts.read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert sum(sum(row["histogram"]) + row["left_alone"] for row in summary["domains"].values()) == PROMPTS
    assert (folder / "histogram.png").read_bytes().startswith(b"\x89PNG")


def test_all_mistakes_are_told_together_and_nothing_is_left(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "1 + 1", "answer": "2", "domain": "law"}\n')
    argv = [str(COMMAND), "difficulty", str(TOY), f"data.train={path}", f"difficulty.output={tmp_path / 'out'}"]
    argv += ["engine.python=/nowhere/python", "rollout.max_new_tokens=4000"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "error: 3 things must be put right" in done.stdout and not (tmp_path / "out").exists()
    assert all(text in done.stdout for text in ("/nowhere/python", "rollout.max_new_tokens 4000", "prompts.jsonl:1"))


def test_a_server_that_does_not_answer_is_told(prompts: Path, tmp_path: Path) -> None:
    argv = [str(COMMAND), "difficulty", str(TOY), f"data.train={prompts}", f"difficulty.output={tmp_path / 'out'}"]
    argv += ["rollout.server.urls=[http://127.0.0.1:9]", "engine.start_timeout_s=1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    assert "did not become ready in 1 s" in done.stdout and f"0 of {PROMPTS} prompts are kept" in done.stdout
