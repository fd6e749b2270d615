"""The life of a group of rollouts: generate -> verify -> score. Groups run side by side."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from megatron_opd.config import RolloutConfig
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.errors import EngineError
from megatron_opd.records import Dropped, Prompt, Rollout, Scored, Verified
from megatron_opd.teachers.pool import TeacherPool
from megatron_opd.verifiers.pool import VerifierPool


@dataclass(frozen=True)
class StepRollouts:
    """Everything that became of one step's prompts."""

    scored: list[Scored]
    dropped: list[Dropped]
    generated_tokens: int  # of all rollouts, dropped ones too
    stage_seconds: dict[str, float]  # mean over groups of the time in "generate", "verify" and "score"


@dataclass(frozen=True)
class _Group:
    """What became of one prompt."""

    results: list[Scored | Dropped]
    generated_tokens: int
    stage_seconds: dict[str, float]


@dataclass(frozen=True)
class Stages:
    """The components that a group passes through."""

    engine: RolloutEngine
    verifiers: VerifierPool
    teachers: TeacherPool
    rollout: RolloutConfig

    async def collect(self, prompts: list[Prompt], version: int, first_group: int) -> StepRollouts:
        """Scored rollouts of ``prompts``, all drawn with the weights of ``version``.

        Raises EngineError when the rollout engine fails for good, or when a token was drawn with other weights.
        """
        groups = await asyncio.gather(
            *(self._group(prompt, first_group + i, version) for i, prompt in enumerate(prompts))
        )
        results = [result for group in groups for result in group.results]
        return StepRollouts(
            scored=[result for result in results if isinstance(result, Scored)],
            dropped=[result for result in results if isinstance(result, Dropped)],
            generated_tokens=sum(group.generated_tokens for group in groups),
            stage_seconds={
                stage: sum(group.stage_seconds[stage] for group in groups) / len(groups)
                for stage in ("generate", "verify", "score")
            },
        )

    async def _group(self, prompt: Prompt, group: int, version: int) -> _Group:
        began = time.monotonic()
        rollouts = await self.engine.sample_group(
            prompt, group, self.rollout.samples_per_prompt, self.rollout.max_new_tokens
        )
        for rollout in rollouts:
            self._check_on_policy(rollout, version)
        generated = time.monotonic()
        verified = await asyncio.gather(*(self.verify(rollout) for rollout in rollouts))
        graded = time.monotonic()
        results = list(await asyncio.gather(*(self.teachers.score(item) for item in verified)))
        seconds = {"generate": generated - began, "verify": graded - generated, "score": time.monotonic() - graded}
        return _Group(results, sum(len(rollout.token_ids) for rollout in rollouts), seconds)

    async def verify(self, rollout: Rollout) -> Verified:
        """The rollout with its outcome."""
        verdict = await self.verifiers.verify(rollout.prompt.domain, rollout.text, rollout.prompt.answer)
        return Verified(rollout, verdict.outcome, verdict.reason)

    def _check_on_policy(self, rollout: Rollout, version: int) -> None:
        if (rollout.versions != version).any():
            raise EngineError(
                "A token was sampled with other weights than this step's",
                where=f"{self.engine.client.url}, prompt {rollout.prompt.id}",
                got=f"weight versions {sorted(set(rollout.versions.tolist()))}",
                expected=version,
            )


def check_dropped_share(dropped: list[Dropped], total: int, limit: float) -> None:
    """Raises EngineError, with the reasons counted, when more than ``limit`` of a step's rollouts were dropped."""
    if not dropped or len(dropped) <= limit * total:
        return
    raise EngineError(
        f"{len(dropped)} of {total} rollouts of one step were dropped",
        where="scoring.max_dropped_share",
        got="".join(f"\n    {line}" for line in drop_reasons(dropped)),
        expected=f"at most {limit:.0%}",
        fix="look at the teacher's log in the run's logs folder",
    )


def drop_reasons(dropped: list[Dropped]) -> list[str]:
    """The three most frequent reasons, each with its count."""
    reasons = Counter(drop.reason for drop in dropped)
    return [f"{count} x {reason}" for reason, count in reasons.most_common(3)]
