"""The life of a group, with fake components of known behaviour."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from megatron_opd.config import RolloutConfig
from megatron_opd.coordinator.stages import Stages, check_dropped_share, drop_reasons
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.verifiers.base import Verdict

PROMPTS = [Prompt(f"p{i}", "math", "?", (5, 6), str(i)) for i in range(3)]


class FakeEngine:
    """Every response has two tokens of the given weight version."""

    client = type("Client", (), {"url": "http://engine"})

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

    async def verify(self, domain: str, response: str, reference: str) -> Verdict:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.01)
        self.running -= 1
        return Verdict(Outcome.CORRECT if response == "r0" else Outcome.INCORRECT, response)


class FakeTeachers:
    """Refuses the second response of each prompt."""

    async def score(self, verified: Verified) -> Scored | Dropped:
        if verified.reason == "r1":
            return Dropped(verified.rollout.prompt.id, "math", "score", "no answer")
        return Scored(verified, "math", np.full(2, -1.0, np.float32))


def stages(version: int, verifiers: FakeVerifiers | None = None) -> Stages:
    rollout = RolloutConfig(samples_per_prompt=4)
    return Stages(FakeEngine(version), verifiers or FakeVerifiers(), FakeTeachers(), rollout)


async def test_every_rollout_is_scored_or_dropped_with_its_outcome_and_group() -> None:
    verifiers = FakeVerifiers()
    result = await stages(3, verifiers).collect(PROMPTS, version=3, first_group=30)
    assert len(result.scored) == 9 and len(result.dropped) == 3 and result.generated_tokens == 24
    assert {item.verified.rollout.group for item in result.scored} == {30, 31, 32}
    assert sum(item.verified.outcome == Outcome.CORRECT for item in result.scored) == 3
    assert verifiers.most == 12  # groups and rollouts side by side
    assert set(result.stage_seconds) == {"generate", "verify", "score"} and result.stage_seconds["verify"] >= 0.01


async def test_a_token_of_other_weights_stops_the_step() -> None:
    with pytest.raises(EngineError, match="other weights") as caught:
        await stages(2).collect(PROMPTS, version=3, first_group=0)
    assert "[2]" in str(caught.value) and "expected: 3" in str(caught.value) and "p0" in str(caught.value)


def test_too_many_drops_stop_the_run_with_their_reasons() -> None:
    dropped = [Dropped(f"p{i}", "math", "score", "no answer" if i else "short") for i in range(5)]
    check_dropped_share(dropped, 100, limit=0.05)
    check_dropped_share([], 0, limit=0.0)
    with pytest.raises(EngineError, match="5 of 99") as caught:
        check_dropped_share(dropped, 99, limit=0.05)
    assert "4 x no answer" in str(caught.value) and drop_reasons(dropped) == ["4 x no answer", "1 x short"]
