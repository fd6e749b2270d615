"""kill -9, and the same command again: the run is the one that was never interrupted."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_opd.engines.rollout import response_seed
from megatron_opd.engines.sglang import Sampling, SGLangClient
from megatron_opd.observe.trajectories import read_trajectories
from megatron_opd.runtime.checkpoints import TRACKER

from runs import Run, Servers, finish

STEPS = 6
SETTINGS = [
    *("existing=resume", "engine.deterministic=true", f"steps={STEPS}", "checkpoint.every_steps=1"),
    *("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "evaluation.limit=8", "evaluation.teachers=false"),
    "data.lazy.prior=[1,1]",  # the next prompts then depend on the rollouts so far
]
MEASURED = ("time/", "perf/", "refresh/seconds")  # by a clock


@pytest.mark.timeout(1800)  # four starts: minutes on two free cores, far more on busy ones
def test_a_run_that_is_killed_again_and_again_is_the_same_to_the_bit(deterministic_servers: Servers, run_train) -> None:
    settings = [*deterministic_servers.attach(), *SETTINGS]
    whole = run_train("whole", *settings)
    assert finish(whole) == 0, whole.text()

    killed = run_train("killed", *settings)
    killed.wait_for_step(3)
    killed.kill_everything()
    again = run_train("killed", *settings)
    again.wait_for_step(STEPS - 1)
    assert "going on after step" in again.text() and "warning" not in again.text()
    again.kill_everything()
    newest = damage_the_newest(again)
    last = run_train("killed", *settings)
    assert finish(last) == 0, last.text()
    assert f"warning: a checkpoint is damaged: A file is damaged\n  where:    {newest}" in last.text()
    assert f"going on after step {int(newest.parent.name.removeprefix('iter_')) - 1}" in last.text()
    assert_same(whole, last)

    finished = run_train("killed", *settings)
    assert finish(finished) == 0 and f"the run had finished after {STEPS} steps" in finished.text()
    changed = run_train("killed", *settings, "optimizer.lr=1e-2", "steps=9")
    assert finish(changed) == 1 and "optimizer.lr: was 0.0003, is 0.01" in changed.text()


def damage_the_newest(run: Run) -> Path:
    """Change one byte of its weights; the file."""
    folder = sorted((run.folder / "checkpoints").glob("iter_*"))[-1]
    file = sorted(folder.glob("*.distcp"))[0]
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    return file


def assert_same(whole: Run, other: Run) -> None:
    """Numbers, rollouts, prompts, results and weights are equal, and nothing was lost or done twice."""
    assert other.steps() == list(range(1, STEPS + 1))
    for expected, found in zip(whole.metrics(), other.metrics(), strict=True):
        assert {key: value for key, value in found.items() if not key.startswith(MEASURED)} == {
            key: value for key, value in expected.items() if not key.startswith(MEASURED)
        }
    for step in range(1, STEPS + 1):
        name = f"trajectories/step_{step:06d}.parquet"
        assert pq.read_table(other.folder / name).equals(pq.read_table(whole.folder / name)), name
    rows = read_trajectories(other.folder / "trajectories")
    groups = rows.column("group").to_numpy()
    assert sorted(set(groups)) == list(range(8 * STEPS)) and np.bincount(groups).tolist() == [4] * 8 * STEPS
    expected, found = whole.summary(), other.summary()
    for key in ("eval", "tokens", "steps", "student"):
        assert found[key] == expected[key]
    weights = "student_hf/model.safetensors"
    assert (other.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert (other.folder / "checkpoints" / TRACKER).read_text() == f"{STEPS}\n"
    thrown_back = [path.parent.name for path in other.folder.glob("superseded/*/*/iter_*")]
    assert thrown_back == ["checkpoints"]  # the damaged one was set aside, not deleted


async def test_a_response_is_the_same_in_any_company(deterministic_servers: Servers) -> None:
    client = SGLangClient(deterministic_servers.rollout, timeout_s=120, max_concurrency=64)
    prompts = [tuple(range(5 + i, 15 + 3 * i)) for i in range(12)]

    async def sample(number: int) -> tuple[list[int], list[float]]:
        sampling = Sampling(40, 1.0, (2,), seed=response_seed(0, "p", number, 0))
        (found,) = await client.generate(prompts[number], 1, sampling)
        return found.token_ids.tolist(), found.logprobs.tolist()

    async def score(number: int) -> list[float]:
        ids = [*prompts[number], *together[number][0]]
        rows = (await client.prompt_logprobs(ids, start=0))["meta_info"]["input_token_logprobs"]
        return rows.logprobs[1:].tolist()  # nothing predicts the first

    together = await asyncio.gather(*map(sample, range(12)))
    assert [await sample(number) for number in (11, 3, 7)] == [together[number] for number in (11, 3, 7)]
    scored = await asyncio.gather(*map(score, range(12)))
    assert [await score(number) for number in (0, 5)] == [scored[number] for number in (0, 5)]
    assert len({tuple(ids) for ids, _ in together}) > 6
    await client.close()


def test_a_server_in_another_mode_is_refused(deterministic_servers: Servers, run_train) -> None:
    run = run_train("mode", *deterministic_servers.attach(), "steps=1", "data.eval=null")
    assert finish(run) == 1
    assert "The server was not started as engine.deterministic says" in run.text()
