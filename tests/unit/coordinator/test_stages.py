"""The life of a group, with fake components of known behaviour."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from megatron_opd.config import BalanceConfig, RolloutConfig
from megatron_opd.coordinator.stages import Stages, check_dropped_share, drop_reasons
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.verifiers.base import Verdict


class FakeEngine:
    """Every response has two tokens of the given weight version."""

    replicas = type("Replicas", (), {"where": "http://engine"})

    def __init__(self, version: int) -> None:
        self.version = version

    async def sample_group(self, prompt: Prompt, group: int, samples: int, max_new_tokens: int) -> list[Rollout]:
        versions = np.full(2, self.version)
        return [
            Rollout(prompt, group, np.array([7, 2]), np.zeros(2, np.float32), versions, "stop", f"r{i}")
            for i in range(samples)
        ]


class FakeVerifiers:
    """Counts how many run at once; the first response of a prompt is right."""

    running = most = 0

    async def verify(self, prompt: Prompt, response: str) -> Verdict:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        return Verdict(Outcome.CORRECT if response == "r0" else Outcome.INCORRECT, response)


class FakeTeachers:
    """Refuses the second response of each prompt."""

    async def score(self, verified: Verified) -> Scored | Dropped:
        if verified.reason == "r1":
            return Dropped(verified.rollout.prompt.id, "math", "score", "no answer", "timeout")
        return Scored(verified, "math", np.full(2, -1.0, np.float32))


class Source:
    """Draws the prompts p0, p1, ... and remembers how many were asked for."""

    def __init__(self, first_group: int = 0) -> None:
        self.first_group = first_group
        self.asked: list[int] = []

    def __call__(self, count: int) -> list[tuple[int, Prompt]]:
        first = sum(self.asked)
        self.asked.append(count)
        numbers = range(first, first + count)
        return [(self.first_group + i, Prompt(f"p{i}", "math", "?", (5, 6), str(i))) for i in numbers]


def stages(
    version: int,
    verifiers: FakeVerifiers | None = None,
    teachers: FakeTeachers | None = None,
    balancing: BalanceConfig | None = None,
) -> Stages:
    rollout = RolloutConfig(prompts_per_step=3, samples_per_prompt=4)
    return Stages(FakeEngine(version), verifiers or FakeVerifiers(), teachers or FakeTeachers(), rollout, balancing, 0)


class WillingTeachers:
    """Scores everything, the first rollouts last, and counts."""

    def __init__(self) -> None:
        self.scored = 0

    async def score(self, verified: Verified) -> Scored:
        self.scored += 1
        await asyncio.sleep(0.02 if verified.rollout.prompt.id == "p0" else 0.0)
        return Scored(verified, "math", np.full(2, -1.0, np.float32))


def names(items: list[Verified]) -> list[str]:
    return [f"{item.rollout.prompt.id}:{item.reason}" for item in items]


async def test_every_rollout_is_scored_or_dropped_with_its_outcome_and_group() -> None:
    verifiers, source = FakeVerifiers(), Source(30)
    result = await stages(3, verifiers).collect(source, step=3)
    assert source.asked == [3] and result.refills == 0
    assert len(result.scored) == 9 and len(result.dropped) == 3 and not result.unscored
    assert len(result.verified) == 12 and result.balanced == [True] * 9
    assert {item.verified.rollout.group for item in result.scored} == {30, 31, 32}
    assert sum(item.verified.outcome == Outcome.CORRECT for item in result.scored) == 3
    assert verifiers.most == 12  # groups and rollouts side by side
    assert set(result.mean_stage_seconds) == {"generate", "verify", "score"}
    assert result.mean_stage_seconds["verify"] >= 0.01


async def test_the_order_is_that_of_the_prompts_whichever_is_ready_first() -> None:
    result = await stages(3, teachers=WillingTeachers()).collect(Source(), step=3)
    assert [item.verified.rollout.group for item in result.scored] == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("order", [None, "after_scoring", "before_scoring"])
async def test_a_sample_is_scored_before_its_group_is_verified_where_balancing_allows(order: str | None) -> None:
    class LateVerifiers(FakeVerifiers):
        async def verify(self, prompt: Prompt, response: str) -> Verdict:
            if response == "r3":
                await asyncio.sleep(0.05)
                scored_early.append(teachers.scored)
            return await super().verify(prompt, response)

    teachers, scored_early = WillingTeachers(), []
    balancing = None if order is None else BalanceConfig(order=order)
    result = await stages(3, LateVerifiers(), teachers, balancing).collect(Source(), step=3)
    assert scored_early == ([0] * 3 if order == "before_scoring" else [9] * 3)
    assert len(result.scored) == (6 if order == "before_scoring" else 12)


async def test_what_balancing_drops_is_never_scored() -> None:
    teachers = WillingTeachers()
    result = await stages(3, teachers=teachers, balancing=BalanceConfig()).collect(Source(), step=3)
    assert teachers.scored == len(result.scored) == 6 and len(result.unscored) == 6 and all(result.balanced)
    for group in range(3):
        outcomes = [item.verified.outcome for item in result.scored if item.verified.rollout.group == group]
        assert sorted(outcomes) == [Outcome.INCORRECT, Outcome.CORRECT]
    again = await stages(3, balancing=BalanceConfig(), teachers=WillingTeachers()).collect(Source(), step=3)
    assert names(again.unscored) == names(result.unscored)  # seeded: a resumed run repeats the draw
    other = await stages(4, balancing=BalanceConfig(), teachers=WillingTeachers()).collect(Source(), step=4)
    assert names(other.unscored) != names(result.unscored)


async def test_balancing_after_scoring_scores_everything_and_marks_what_is_not_trained() -> None:
    teachers, order = WillingTeachers(), BalanceConfig(order="after_scoring")
    result = await stages(3, teachers=teachers, balancing=order).collect(Source(), step=3)
    assert teachers.scored == len(result.scored) == 12 and not result.unscored
    before = await stages(3, teachers=teachers, balancing=BalanceConfig()).collect(Source(), step=3)
    kept = [item.verified for item, kept in zip(result.scored, result.balanced, strict=True) if kept]
    assert names(kept) == names([item.verified for item in before.scored])


async def test_the_global_scope_balances_the_step_as_one() -> None:
    everywhere = BalanceConfig(scope="global")
    result = await stages(3, teachers=WillingTeachers(), balancing=everywhere).collect(Source(), step=3)
    outcomes = [item.verified.outcome for item in result.scored]
    assert outcomes.count(Outcome.CORRECT) == outcomes.count(Outcome.INCORRECT) == 3
    assert len(result.times) == 3


async def test_a_refill_draws_further_prompts_until_the_step_has_its_size() -> None:
    source = Source(7)
    refilled = BalanceConfig(refill_rounds=5)
    result = await stages(3, teachers=WillingTeachers(), balancing=refilled).collect(source, step=3)
    # Half of each group stays: 6 of 12 are missing, which is 3 prompts; then nothing is.
    assert source.asked == [3, 3] and result.refills == 3 and len(result.scored) == 12
    assert sorted({item.rollout.group for item in result.verified}) == list(range(7, 13))
    once = Source()
    await stages(3, teachers=WillingTeachers(), balancing=BalanceConfig()).collect(once, step=3)
    assert once.asked == [3]


async def test_a_token_of_other_weights_stops_the_step() -> None:
    with pytest.raises(EngineError, match="other weights") as caught:
        await stages(2).collect(Source(), step=3)
    assert "[2]" in str(caught.value) and "expected: 3" in str(caught.value) and "p0" in str(caught.value)


def test_too_many_drops_stop_the_run_with_their_reasons() -> None:
    reasons = [("a row short", "count"), *[("no answer", "timeout")] * 4]
    dropped = [Dropped(f"p{i}", "math", "score", *reason) for i, reason in enumerate(reasons)]
    check_dropped_share(dropped, 100, limit=0.05)
    check_dropped_share([], 0, limit=0.0)
    with pytest.raises(EngineError, match="5 of 99") as caught:
        check_dropped_share(dropped, 99, limit=0.05)
    assert "4 x timeout" in str(caught.value)
    assert drop_reasons(dropped) == ["4 x timeout, such as no answer", "1 x count, such as a row short"]
