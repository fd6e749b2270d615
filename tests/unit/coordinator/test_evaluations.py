"""Evaluation in training: beside it where steps overlap, between the steps else. Time is virtual."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_world import FakeWorld, Times
from virtual_time import run_in_virtual_time

from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.errors import EngineError
from megatron_opd.observe.recorder import read_events
from megatron_opd.records import Prompt

HELD_OUT, PROMPTS = 4, 1000
SIZE = ("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "steps=6", "evaluation.before=false")
EVERY_2 = ("data.eval=tools/toy/data/eval.jsonl", "evaluation.every_steps=2", "evaluation.concurrency=2")
QUICK = Times(1.0, 1.0, 4.0, slots=16)  # the student is the slowest, and the engine has room


def drive(folder: Path, times: Times, *overrides: str, broken: bool = False) -> FakeWorld:
    async def run() -> FakeWorld:
        world = FakeWorld(folder, times, *SIZE, *overrides, prompts=PROMPTS, held_out=HELD_OUT)

        def seen(prompt: Prompt, live: int) -> int:
            if broken and live == 2 and int(prompt.id[1:]) >= PROMPTS:
                raise EngineError("out of order")
            return live

        world.engine.version_of = seen
        await world.drive()
        return world

    return run_in_virtual_time(run())


def test_most_of_the_engine_is_left_to_training(tmp_path: Path) -> None:
    under_way: set[str] = set()
    most = [0]

    async def run() -> None:
        overrides = (*SIZE, *EVERY_2, "rollout.max_staleness=1", "steps=3")
        world = FakeWorld(tmp_path, QUICK, *overrides, prompts=PROMPTS, held_out=HELD_OUT)

        def seen(prompt: Prompt, live: int) -> int:  # called when a group begins and when it ends
            if int(prompt.id[1:]) >= PROMPTS and (live == 2 or prompt.id in under_way):
                under_way.symmetric_difference_update({prompt.id})
                most[0] = max(most[0], len(under_way))
            return live

        world.engine.version_of = seen
        await world.drive()

    run_in_virtual_time(run())
    assert most == [2] and not under_way


def during(world: FakeWorld) -> list[dict]:
    return [e for e in read_events(world.run.events) if e["event"] == "evaluated" and e["when"] == "during"]


def test_training_goes_on_where_steps_overlap(tmp_path: Path) -> None:
    plain = drive(tmp_path, QUICK, "name=plain", "rollout.max_staleness=1")
    world = drive(tmp_path, QUICK, "name=beside", "rollout.max_staleness=1", *EVERY_2)
    assert world.student.finished == plain.student.finished
    assert [event["step"] for event in during(world)] == [2, 4]  # after step 6 there is the one at the end
    for event in during(world):
        assert event["weights"][0] >= event["step"] and set(event["accuracy"]) == {"math"}
    rates = read_pass_rates(world.run.evaluation("step_000002"))
    assert len(rates.ids) == HELD_OUT and rates.samples.sum() == HELD_OUT
    assert world.engine.asked.count(f"p{PROMPTS}") == 3


def test_strictly_on_policy_it_waits_and_all_is_drawn_by_one_version(tmp_path: Path) -> None:
    plain = drive(tmp_path, QUICK, "name=plain")
    world = drive(tmp_path, QUICK, "name=between", *EVERY_2)
    assert world.student.finished[:2] == plain.student.finished[:2]
    assert world.student.finished[-1] > plain.student.finished[-1]
    assert [event["weights"] for event in during(world)] == [[2, 2], [4, 4]]


def test_one_that_would_begin_before_the_last_has_ended_is_left_out_and_told(tmp_path: Path) -> None:
    slow = Times(8.0, 0.1, 0.1, slots=8)
    world = drive(
        tmp_path, slow, *EVERY_2, "evaluation.every_steps=1", "evaluation.concurrency=1", "rollout.max_staleness=1"
    )
    skipped = [event["step"] for event in read_events(world.run.events) if event["event"] == "evaluation_skipped"]
    assert skipped and sorted([*skipped, *(event["step"] for event in during(world))]) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("staleness", [0, 1])
def test_one_that_fails_ends_the_run(tmp_path: Path, staleness: int) -> None:
    with pytest.raises(BaseExceptionGroup) as caught:
        drive(tmp_path, QUICK, *EVERY_2, f"rollout.max_staleness={staleness}", broken=True)
    assert caught.group_contains(EngineError, match="out of order")
