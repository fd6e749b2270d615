"""The coordinator's loop: what on-policy distillation does, step by step.

    wait until weights k are live -> draw prompts -> generate groups -> verify -> score -> advantages -> pack -> offer

Strictly on-policy: batch k holds rollouts of weights k only, and the next one is begun when weights k + 1 are live.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_opd.config import Config
from megatron_opd.coordinator.app import BatchBoard
from megatron_opd.coordinator.evaluate import Accuracy, evaluate
from megatron_opd.coordinator.stages import Stages, StepRollouts, check_dropped_share, drop_reasons
from megatron_opd.data.stream import PromptStream
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.observe.recorder import Recorder
from megatron_opd.recipe.advantage import train_sample
from megatron_opd.recipe.diagnostics import rollout_metrics
from megatron_opd.recipe.pack import pack
from megatron_opd.records import PackedBatch, Prompt
from megatron_opd.runtime.messages import RefreshReport
from megatron_opd.runtime.wire import encode

logger = logging.getLogger(__name__)


@dataclass
class Totals:
    """Tokens since the start."""

    generated: int = 0
    scored: int = 0
    trained: int = 0


@dataclass
class Loop:
    """One run, from the first evaluation to the last."""

    config: Config
    stages: Stages
    graders: dict[str, RolloutEngine]  # domain -> its teacher, as a sampler for the evaluation
    stream: PromptStream
    held_out: Sequence[Prompt]
    board: BatchBoard
    recorder: Recorder
    totals: Totals = field(default_factory=Totals)
    evaluations: dict[str, dict[str, Accuracy]] = field(default_factory=dict)

    async def run(self) -> None:
        """Drive the run to its end."""
        start = await self.board.live(0)
        self.recorder.event("live", **start.model_dump())
        await self._evaluate("before", with_teachers=self.config.evaluation.teachers)
        for step in range(self.config.steps):
            await self._step(step)
        await self._evaluate("after", with_teachers=False)

    async def _step(self, step: int) -> None:
        began = time.monotonic()
        prompts = self.stream.take(self.config.rollout.prompts_per_step)
        rollouts = await self.stages.collect(prompts, version=step, first_group=step * len(prompts))
        if rollouts.dropped:
            self.recorder.event("dropped", step=step + 1, reasons=drop_reasons(rollouts.dropped))
        check_dropped_share(rollouts.dropped, self._rollouts_per_step, self.config.scoring.max_dropped_share)
        batches = self._batches(rollouts, version=step)
        offered = time.monotonic()
        await self.board.publish(step, [encode(batch) for batch in batches])
        report = await self.board.live(step + 1)
        self._record(step, rollouts, report, collect_s=offered - began, step_s=time.monotonic() - began)

    def _batches(self, rollouts: StepRollouts, version: int) -> list[PackedBatch]:
        loss, student = self.config.loss, self.config.student
        samples = [train_sample(scored, loss.max_gap, loss.normalize) for scored in rollouts.scored]
        batches = pack(samples, student.row_tokens, student.data_parallel, version)
        self.totals.trained += sum(int((batch.weights > 0).sum()) for batch in batches)
        return batches

    @property
    def _rollouts_per_step(self) -> int:
        return self.config.rollout.prompts_per_step * self.config.rollout.samples_per_prompt

    def _record(
        self, step: int, rollouts: StepRollouts, report: RefreshReport, *, collect_s: float, step_s: float
    ) -> None:
        tokens = sum(len(scored.teacher_logprobs) for scored in rollouts.scored)
        self.totals.scored += tokens
        self.totals.generated += rollouts.generated_tokens
        metrics = rollout_metrics(rollouts.scored, self.config.loss.max_gap)
        metrics |= report.training
        metrics |= {
            "teacher/dropped": len(rollouts.dropped),
            "refresh/seconds": report.refresh_s,
            "refresh/probe_difference": report.probe_difference,
            **{f"time/{stage}_s": seconds for stage, seconds in rollouts.stage_seconds.items()},
            "time/collect_s": collect_s,
            "time/step_s": step_s,
            "perf/tokens_per_s": tokens / step_s,
        }
        self.recorder.step(step + 1, metrics)
        logger.info(
            "step %d: %d rollouts in %.2f s, %d dropped",
            step + 1,
            len(rollouts.scored),
            collect_s,
            len(rollouts.dropped),
        )

    async def _evaluate(self, when: str, *, with_teachers: bool) -> None:
        if not self.held_out:
            return
        self.recorder.event("evaluating", when=when, prompts=len(self.held_out))
        jobs = {when: self._accuracy(self.stages.engine, self.held_out)}
        for domain, grader in self.graders.items() if with_teachers else ():
            own = [prompt for prompt in self.held_out if prompt.domain == domain]
            jobs[f"teacher {domain}"] = self._accuracy(grader, own)
        results = await asyncio.gather(*jobs.values())
        self.evaluations[when] = results[0]
        for result in results[1:]:
            self.evaluations["teacher"] = self.evaluations.get("teacher", {}) | result
        for name, accuracies in zip(jobs, results, strict=True):
            shares = {domain: accuracy.value for domain, accuracy in accuracies.items()}
            self.recorder.event("evaluated", when=name, accuracy=shares)

    async def _accuracy(self, engine: RolloutEngine, prompts: Sequence[Prompt]) -> dict[str, Accuracy]:
        accuracies = await evaluate(engine, self.stages.verifiers, list(prompts), self.config)
        self.totals.generated += sum(accuracy.tokens for accuracy in accuracies.values())
        return accuracies
