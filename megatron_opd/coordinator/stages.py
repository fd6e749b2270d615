"""The life of a step's rollouts: generate -> verify -> balance -> score. Groups run side by side.

Where balancing waits for nothing, a sample is scored as soon as it is verified; else as soon as its group is balanced.
"""

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
Times = tuple[float, float, float, float, float]
"""Moments of one group, time.time(): began, generated, verified, asked the teacher, scored."""
STALE_ATTEMPTS = 4  # times that a group is drawn before an engine that goes on with old weights stops the run

Draw = Callable[[int], list[tuple[int, Prompt]]]
Judged = tuple[Verified, Scored | Dropped | None]  # None: not scored yet


@dataclass
class StepRollouts:
    """Everything that became of one step's prompts. Filled group by group; each rollout is in exactly one list."""

    scored: list[Scored] = field(default_factory=list)
    balanced: list[bool] = field(default_factory=list)  # one for each of ``scored``: false where balancing dropped it
    unscored: list[Verified] = field(default_factory=list)  # what balancing dropped before it was scored
    dropped: list[tuple[Verified, Dropped]] = field(default_factory=list)  # lost to a failed teacher call
    stale: list[tuple[Rollout, Dropped]] = field(default_factory=list)  # too old, and drawn again
    times: list[Times] = field(default_factory=list)  # of each group
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
        self.stale += part.stale
        self.times += part.times

    @property
    def mean_stage_seconds(self) -> dict[str, float]:
        """Mean time of a group in each stage."""
        began, generated, verified, asked, scored = np.mean(self.times, axis=0).tolist()
        return dict(zip(STAGES, (generated - began, verified - generated, scored - asked), strict=True))


@dataclass(frozen=True)
class _Group:
    """What one prompt gave."""

    judged: list[Judged]
    stale: list[tuple[Rollout, Dropped]]
    times: tuple[float, float, float, float]  # as Times, without the moment of asking; scored: where all are


@dataclass(frozen=True)
class Stages:
    """The components that a group passes through."""

    engine: RolloutEngine
    verifiers: VerifierPool
    teachers: TeacherPool
    rollout: RolloutConfig
    balancing: BalanceConfig | None
    seed: int
    advance: Callable[[], None] = lambda: None  # called for each group that has passed all stages

    async def collect(self, draw: Draw, step: int) -> StepRollouts:
        """Scored rollouts of a step; ``draw(n)`` gives the next n prompts, each with the number of its group.

        The order of the result is that of the prompts, whichever is ready first. Raises EngineError when the rollout
        engine fails for good, or when it goes on drawing tokens with weights that are too old or of a later step.
        """
        found, drawn, wanted = StepRollouts(), 0, self.rollout.prompts_per_step
        rounds = 1 + (self.balancing.refill_rounds if self.balancing else 0)
        while rounds > 0 and wanted > 0:
            for part in await self._round(draw(wanted), step):
                found.extend(part)
            rounds, drawn, wanted = rounds - 1, drawn + wanted, self._lacking(found)
        found.refills = drawn - self.rollout.prompts_per_step
        return found

    async def _round(self, prompts: list[tuple[int, Prompt]], step: int) -> list[StepRollouts]:
        """Take ``prompts`` through all stages; a group is balanced and scored alone, unless the step is one unit."""
        sampling = [self._sample(prompt, group, step) for group, prompt in prompts]
        if self.balancing is not None and self.balancing.scope == "global":
            return [await self._balance_and_score(await asyncio.gather(*sampling), step)]

        async def whole(sampled: Awaitable[_Group]) -> StepRollouts:
            return await self._balance_and_score([await sampled], step)

        return await asyncio.gather(*map(whole, sampling))

    async def _sample(self, prompt: Prompt, group: int, step: int) -> _Group:
        """Verified rollouts of one prompt, scored where balancing allows."""
        began = time.time()
        rollouts, stale = await self._generate(prompt, group, step)
        generated = time.time()
        moments: list[float] = []

        async def judge(rollout: Rollout) -> Judged:
            verified = await self.verify(rollout)
            moments.append(time.time())
            return verified, await self.teachers.score(verified) if self._scores_all else None

        judged = await asyncio.gather(*map(judge, rollouts))
        return _Group(judged, stale, (began, generated, max(moments), time.time()))

    async def _generate(self, prompt: Prompt, group: int, step: int) -> tuple[list[Rollout], list]:
        """A group within the bound of staleness, and what was too old, which is as whole groups."""
        bound, stale = self.rollout.max_staleness, []
        for _ in range(STALE_ATTEMPTS if bound else 1):
            rollouts = await self.engine.sample_group(
                prompt, group, self.rollout.samples_per_prompt, self.rollout.max_new_tokens
            )
            oldest = min(int(rollout.versions.min()) for rollout in rollouts)
            newest = max(int(rollout.versions.max()) for rollout in rollouts)
            if step - bound <= oldest and newest <= step:
                return rollouts, stale
            reason = f"weights {oldest} at step {step}, max_staleness {bound}"
            stale += [(rollout, Dropped(prompt.id, prompt.domain, "stale", reason, "stale")) for rollout in rollouts]
        raise EngineError(
            "A token was sampled with other weights than this step's",
            where=f"{self.engine.replicas.where}, prompt {prompt.id}",
            got=f"weight versions {sorted({oldest, newest})}",
            expected=f"{step - bound} to {step}" if bound else step,
        )

    async def _balance_and_score(self, groups: Sequence[_Group], step: int) -> StepRollouts:
        """Score what balancing keeps, where it is not scored yet."""
        asked_at = time.time()
        judged = [item for group in groups for item in group.judged]
        keep = self._keep([verified for verified, _ in judged], step)
        part = StepRollouts(
            unscored=[item for (item, _), kept in zip(judged, keep, strict=True) if not (kept or self._scores_all)],
            stale=[item for group in groups for item in group.stale],
        )
        asked = [(*item, kept) for item, kept in zip(judged, keep, strict=True) if kept or self._scores_all]
        if not self._scores_all:
            scores = await asyncio.gather(*(self.teachers.score(item) for item, _, _ in asked))
            asked = [(item, score, kept) for (item, _, kept), score in zip(asked, scores, strict=True)]
        for item, result, kept in asked:
            if isinstance(result, Scored):
                part.scored.append(result)
                part.balanced.append(kept)
            else:
                part.dropped.append((item, result))
        for *earlier, scored in (group.times for group in groups):  # where all are scored, that was done before
            part.times.append(
                (*earlier, earlier[-1], scored) if self._scores_all else (*earlier, asked_at, time.time())
            )
            self.advance()
        return part

    @property
    def _scores_all(self) -> bool:
        """Whether a rollout is scored whatever balancing says of it."""
        return self.balancing is None or self.balancing.order == "after_scoring"

    def _keep(self, verified: list[Verified], step: int) -> list[bool]:
        if self.balancing is None:
            return [True] * len(verified)
        outcomes = np.array([item.outcome for item in verified], dtype=np.int8)
        groups = np.array([item.rollout.group for item in verified], dtype=np.int64)
        return balance(outcomes, groups, self.balancing, self.seed, step).keep.tolist()

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
    """Every kind with its count and one example, the most frequent first."""
    examples = {drop.kind: drop.reason for drop in reversed(dropped)}
    kinds = Counter(drop.kind for drop in dropped)
    return [f"{count} x {kind}, such as {examples[kind]}" for kind, count in kinds.most_common()]
