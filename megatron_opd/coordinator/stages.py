"""The life of a step's rollouts: generate -> verify -> balance -> score. Groups run side by side."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_opd.config import BalanceConfig, RolloutConfig
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.errors import EngineError
from megatron_opd.recipe.balance import balance, refill_needed
from megatron_opd.records import Dropped, Prompt, Rollout, Scored, Verified
from megatron_opd.teachers.pool import TeacherPool
from megatron_opd.verifiers.pool import VerifierPool

STAGES = ("generate", "verify", "score")


@dataclass
class StepRollouts:
    """Everything that became of one step's prompts. Filled group by group; each rollout is in exactly one list."""

    scored: list[Scored] = field(default_factory=list)
    balanced: list[bool] = field(default_factory=list)  # one for each of ``scored``: false where balancing dropped it
    unscored: list[Verified] = field(default_factory=list)  # what balancing dropped before it was scored
    dropped: list[tuple[Verified, Dropped]] = field(default_factory=list)  # lost to a failed teacher call
    stage_seconds: list[tuple[float, float, float]] = field(default_factory=list)  # of each group, as STAGES
    refills: int = 0  # prompts that were drawn to make up for what balancing dropped

    @property
    def verified(self) -> list[Verified]:
        """Every rollout of the step."""
        return [*(item.verified for item in self.scored), *self.unscored, *(item for item, _ in self.dropped)]

    def extend(self, part: StepRollouts) -> None:
        """Take in what became of further groups."""
        self.scored += part.scored
        self.balanced += part.balanced
        self.unscored += part.unscored
        self.dropped += part.dropped
        self.stage_seconds += part.stage_seconds

    @property
    def mean_stage_seconds(self) -> dict[str, float]:
        """Mean time of a group in each stage."""
        return dict(zip(STAGES, np.mean(self.stage_seconds, axis=0).tolist(), strict=True))


@dataclass(frozen=True)
class Stages:
    """The components that a group passes through."""

    engine: RolloutEngine
    verifiers: VerifierPool
    teachers: TeacherPool
    rollout: RolloutConfig
    balancing: BalanceConfig | None
    seed: int

    async def collect(self, draw: Callable[[int], list[Prompt]], version: int, first_group: int) -> StepRollouts:
        """Scored rollouts of a step, all drawn with the weights of ``version``; ``draw(n)`` gives the next n prompts.

        The order of the result is that of the prompts, whichever is ready first. Raises EngineError when the rollout
        engine fails for good, or when a token was drawn with other weights.
        """
        step, drawn, wanted = StepRollouts(), 0, self.rollout.prompts_per_step
        rounds = 1 + (self.balancing.refill_rounds if self.balancing else 0)
        while rounds > 0 and wanted > 0:
            for part in await self._round(draw(wanted), version, first_group + drawn):
                step.extend(part)
            rounds, drawn, wanted = rounds - 1, drawn + wanted, self._lacking(step)
        step.refills = drawn - self.rollout.prompts_per_step
        return step

    async def _round(self, prompts: list[Prompt], version: int, first_group: int) -> list[StepRollouts]:
        """Take ``prompts`` through all stages; a group is balanced and scored alone, unless the step is one unit."""
        sampling = [self._sample(prompt, first_group + i, version) for i, prompt in enumerate(prompts)]
        if self.balancing is not None and self.balancing.scope == "global":
            groups = await asyncio.gather(*sampling)
            everything = [item for verified, _ in groups for item in verified]
            return [await self._balance_and_score(everything, [seconds for _, seconds in groups], version)]

        async def whole(sampled: Awaitable[tuple[list[Verified], tuple[float, float]]]) -> StepRollouts:
            verified, seconds = await sampled
            return await self._balance_and_score(verified, [seconds], version)

        return await asyncio.gather(*map(whole, sampling))

    async def _sample(self, prompt: Prompt, group: int, version: int) -> tuple[list[Verified], tuple[float, float]]:
        """Verified rollouts of one prompt, and the seconds that generating and verifying took."""
        began = time.monotonic()
        rollouts = await self.engine.sample_group(
            prompt, group, self.rollout.samples_per_prompt, self.rollout.max_new_tokens
        )
        for rollout in rollouts:
            self._check_on_policy(rollout, version)
        generated = time.monotonic()
        verified = await asyncio.gather(*(self.verify(rollout) for rollout in rollouts))
        return list(verified), (generated - began, time.monotonic() - generated)

    async def _balance_and_score(
        self, verified: list[Verified], seconds: Sequence[tuple[float, float]], version: int
    ) -> StepRollouts:
        """Score what balancing keeps, or all where it comes after scoring."""
        began = time.monotonic()
        keep = self._keep(verified, version)
        score_all = self.balancing is not None and self.balancing.order == "after_scoring"
        asked = [(item, kept) for item, kept in zip(verified, keep, strict=True) if kept or score_all]
        part = StepRollouts(
            unscored=[item for item, kept in zip(verified, keep, strict=True) if not kept and not score_all]
        )
        results = await asyncio.gather(*(self.teachers.score(item) for item, _ in asked))
        for (item, kept), result in zip(asked, results, strict=True):
            if isinstance(result, Scored):
                part.scored.append(result)
                part.balanced.append(kept)
            else:
                part.dropped.append((item, result))
        part.stage_seconds += [(*pair, time.monotonic() - began) for pair in seconds]
        return part

    def _keep(self, verified: list[Verified], version: int) -> list[bool]:
        if self.balancing is None:
            return [True] * len(verified)
        outcomes = np.array([item.outcome for item in verified], dtype=np.int8)
        groups = np.array([item.rollout.group for item in verified], dtype=np.int64)
        return balance(outcomes, groups, self.balancing, self.seed, version).keep.tolist()

    def _lacking(self, step: StepRollouts) -> int:
        """Prompts to draw so that the step has its size; failed teacher calls are not made up for."""
        if self.balancing is None:
            return 0
        kept = [*step.balanced, *[True] * len(step.dropped), *[False] * len(step.unscored)]
        samples = self.rollout.samples_per_prompt
        return refill_needed(np.array(kept, dtype=bool), self.rollout.prompts_per_step * samples, samples).prompts

    async def verify(self, rollout: Rollout) -> Verified:
        """The rollout with its outcome."""
        verdict = await self.verifiers.verify(rollout.prompt, rollout.text)
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
    """Raises EngineError, with the reasons counted, when more than ``limit`` of ``total`` scorings were dropped."""
    if not dropped or len(dropped) <= limit * total:
        return
    raise EngineError(
        f"{len(dropped)} of {total} rollouts that a teacher was asked to score were dropped",
        where="scoring.max_dropped_share",
        got="".join(f"\n    {line}" for line in drop_reasons(dropped)),
        expected=f"at most {limit:.0%}",
        fix="look at the teacher's log in the run's logs folder",
    )


def drop_reasons(dropped: list[Dropped]) -> list[str]:
    """The three most frequent reasons, each with its count."""
    reasons = Counter(drop.reason for drop in dropped)
    return [f"{count} x {reason}" for reason, count in reasons.most_common(3)]
