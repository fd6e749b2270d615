"""Rollouts, scoring and training at once: the real loop among fakes that take a known time, on a clock that jumps."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_world import FakeWorld, Times
from virtual_time import run_in_virtual_time

from megatron_opd.coordinator.stages import STALE_ATTEMPTS
from megatron_opd.data.stream import PromptStream
from megatron_opd.errors import EngineError
from megatron_opd.observe.trajectories import read_trajectories
from megatron_opd.records import Prompt

GROUPS, STEPS = 8, 6
SIZE = (f"rollout.prompts_per_step={GROUPS}", "rollout.samples_per_prompt=4", f"steps={STEPS}")
STREAM, WAVE = 2, GROUPS  # groups that are served at once
Change = Callable[[FakeWorld], None]


def drive(folder: Path, times: Times, *overrides: str, change: Change = lambda world: None, **facts: int) -> FakeWorld:
    """A run from its start, or from a saved step, to its end."""

    async def run() -> FakeWorld:
        world = FakeWorld(folder, times, *SIZE, *overrides, **facts)
        change(world)
        await world.drive()
        return world

    return run_in_virtual_time(run())


def metrics(world: FakeWorld) -> list[dict]:
    return [json.loads(line) for line in world.run.metrics.read_text().splitlines()]


def trained(world: FakeWorld, last: int = STEPS) -> list[str]:
    """Prompts of the steps up to ``last``, one entry for each group, in the order of the batches."""
    rows = read_trajectories(world.run.trajectories)
    groups = dict.fromkeys(
        (group, prompt)
        for step, group, prompt in zip(
            *(rows.column(name).to_pylist() for name in ("step", "group", "prompt_id")), strict=True
        )
        if step <= last
    )
    return [prompt for _, prompt in groups]


@pytest.mark.parametrize("slots", [STREAM, WAVE])
@pytest.mark.parametrize("stages", [(3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (1.0, 2.0, 4.0)])
def test_a_step_takes_as_long_as_its_slowest_stage(tmp_path: Path, stages: tuple, slots: int) -> None:
    seconds = {}
    for staleness in (0, 1):
        override = (f"rollout.max_staleness={staleness}", f"name=s{staleness}", "record.trajectories_every=0")
        world = drive(tmp_path, Times(*stages, slots), *override, "checkpoint.every_steps=0")
        seconds[staleness] = (world.student.finished[-1] - world.student.finished[1]) / (STEPS - 2)
        assert world.student.most_lag == [min(step, staleness) for step in range(STEPS)]
    assert seconds[1] <= 1.05 * max(stages)
    if slots == WAVE:
        assert seconds[0] == pytest.approx(sum(stages))
    else:  # groups are scored while others are generated, at staleness 0 too
        assert max(stages) + min(stages) < seconds[0] < sum(stages)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_batches_are_the_same_and_no_prompt_is_skipped_or_repeated(tmp_path: Path, staleness: int) -> None:
    strict = drive(tmp_path, Times(1, 1, 1, STREAM), "name=strict", prompts=GROUPS * STEPS)
    world = drive(tmp_path, Times(3, 1, 2, STREAM), f"rollout.max_staleness={staleness}", prompts=GROUPS * STEPS)
    assert trained(world) == trained(strict)
    assert Counter(trained(world)) == Counter({f"p{i}": 1 for i in range(GROUPS * STEPS)})
    rows = metrics(world)
    assert [row["rollout/staleness_max"] for row in rows] == world.student.most_lag
    assert all(0 <= row["rollout/staleness"] <= row["rollout/staleness_max"] <= staleness for row in rows)
    assert not any(row["rollout/stale_dropped"] for row in rows)


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_the_engine_is_never_further_ahead_than_the_bound(tmp_path: Path, staleness: int) -> None:
    most = []

    def watch(world: FakeWorld) -> None:
        def seen(prompt: Prompt, live: int) -> int:
            most.append(len(world.engine.asked) - GROUPS * live)
            return live

        world.engine.version_of = seen

    world = drive(tmp_path, Times(0.1, 0.1, 5, STREAM), f"rollout.max_staleness={staleness}", change=watch)
    assert max(most) == GROUPS * (staleness + 1)
    ready = [row.get("perf/ready_steps") for row in metrics(world)]  # the student is the slowest: the buffer is full
    assert ready == [min(staleness, STEPS - 1 - step) if staleness else None for step in range(STEPS)]


def out_of_date(prompt: str, times: int) -> Change:
    """The engine draws a prompt with the first weights of all, for so many times."""

    def change(world: FakeWorld) -> None:
        def seen(asked: Prompt, live: int) -> int:
            return 0 if asked.id == prompt and world.engine.asked.count(prompt) <= times else live

        world.engine.version_of = seen

    return change


def test_what_is_too_old_is_dropped_counted_and_drawn_again(tmp_path: Path) -> None:
    world = drive(tmp_path, Times(1, 1, 1, 1), "rollout.max_staleness=1", prompts=GROUPS * STEPS)
    victim = trained(world)[-1]
    fixed = ("name=stale", "rollout.max_staleness=1")
    world = drive(tmp_path, Times(1, 1, 1, 1), *fixed, change=out_of_date(victim, 2), prompts=GROUPS * STEPS)
    rows = metrics(world)
    assert [row["rollout/stale_dropped"] for row in rows] == [0] * (STEPS - 1) + [8]  # two groups of four
    assert max(world.student.most_lag) == 1
    assert Counter(trained(world)) == Counter({f"p{i}": 1 for i in range(GROUPS * STEPS)})
    assert world.engine.asked.count(victim) == 3
    (event,) = [e for e in map(json.loads, world.run.events.read_text().splitlines()) if e["event"] == "dropped"]
    assert event["step"] == STEPS and event["reasons"] == ["8 x stale, such as weights 0 at step 5, max_staleness 1"]
    generated = 4 * 4 * GROUPS * STEPS  # tokens x samples
    assert world.loop.progress.totals.generated == generated + 32
    assert world.loop.progress.totals.sampled == generated
    for row in read_trajectories(world.run.trajectories).to_pylist():
        again = row["prompt_id"] == victim
        assert (row["stale_samples"], row["stale_oldest"]) == ((8, 0) if again else (0, None))
        # Weights k are those that step k + 1 trains; this run is at most one step late.
        assert row["step"] - 2 <= row["min_version"] <= row["max_version"] <= row["step"] - 1


@pytest.mark.parametrize(("staleness", "attempts"), [(0, 1), (1, STALE_ATTEMPTS)])
def test_an_engine_that_stays_out_of_date_stops_the_run(tmp_path: Path, staleness: int, attempts: int) -> None:
    victim = trained(drive(tmp_path, Times(1, 1, 1, 1), "name=first", prompts=GROUPS * STEPS))[-1]
    worlds: list[FakeWorld] = []

    def change(world: FakeWorld) -> None:
        worlds.append(world)
        out_of_date(victim, 100)(world)

    override = f"rollout.max_staleness={staleness}"
    with pytest.raises(ExceptionGroup) as caught:
        drive(tmp_path, Times(1, 1, 1, 1), override, change=change, prompts=GROUPS * STEPS)
    (error,) = caught.value.exceptions
    assert isinstance(error, EngineError) and f"prompt {victim}" in str(error) and "other weights" in str(error)
    assert worlds[0].engine.asked.count(victim) == attempts


@pytest.mark.parametrize("staleness", [0, 1, 2])
@pytest.mark.parametrize("stopped_s", [7.6, 8.9])
@pytest.mark.parametrize("recipe", [(), ("balance.refill_rounds=2",)], ids=["plain", "refilled"])
def test_a_run_that_dies_and_goes_on_trains_every_prompt_once(
    tmp_path: Path, staleness: int, stopped_s: float, recipe: tuple
) -> None:
    options, times = (f"rollout.max_staleness={staleness}", *recipe), Times(1.5, 0.4, 1.1, STREAM)

    async def die() -> FakeWorld:
        world = FakeWorld(tmp_path, times, *SIZE, *options)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(world.drive(), stopped_s)
        return world

    first = run_in_virtual_time(die())
    saved = max(int(path.name.rpartition("_")[2]) for path in first.run.checkpoints.path.glob(".coordinator_*"))
    assert 0 < saved < STEPS
    before = trained(first, saved)
    second = drive(tmp_path, times, *options, resume_from=saved)
    found = trained(second)
    assert found[: len(before)] == before and metrics(second)[-1]["step"] == STEPS
    assert len(found) > GROUPS * STEPS if recipe else len(found) == GROUPS * STEPS
    stream = PromptStream(second.loop.stream.prompts, second.config.seed)
    assert Counter(found) == Counter(prompt.id for prompt in stream.take(len(found)))  # the first ones, once each


def test_a_budget_of_tokens_ends_a_run_that_was_ahead(tmp_path: Path) -> None:
    budget = 3 * GROUPS * 4 * 4
    world = drive(tmp_path, Times(1, 1, 1, STREAM), "rollout.max_staleness=2", f"max_generated_tokens={budget}")
    assert len(world.student.finished) == 3 and world.loop.progress.totals.sampled == budget
    saved = json.loads((world.run.checkpoints.coordinator_state(3) / "state.json").read_text())
    assert len(saved["in_flight"]) == 2 * GROUPS  # drawn for steps that a longer run would have had
