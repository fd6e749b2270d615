"""The coordinator's loop: what on-policy distillation does, step by step.

    wait until weights k are live -> draw prompts -> generate groups -> verify -> balance -> score -> calibrate -> pack
    -> offer

Strictly on-policy (rollout.max_staleness 0): batch k holds rollouts of weights k only, and the next one is begun when
weights k + 1 are live. With max_staleness s, the steps up to k + s are begun when weights k are live (``buffer``), so
that rollouts, scoring and training are busy at once.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from megatron_opd.config import Config
from megatron_opd.coordinator.app import BatchBoard
from megatron_opd.coordinator.buffer import Draws, Prepared, StepBuffer, buffered_s
from megatron_opd.coordinator.evaluate import Accuracy, Graded, accuracies, evaluate
from megatron_opd.coordinator.evaluations import Evaluations
from megatron_opd.coordinator.metrics import step_metrics
from megatron_opd.coordinator.stages import Stages, StepRollouts, check_dropped_share, drop_reasons
from megatron_opd.coordinator.state import Progress, write
from megatron_opd.data.inputs import Stream
from megatron_opd.data.pass_rates import write_pass_rates
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.recorder import Recorder
from megatron_opd.observe.timeline import record_timeline
from megatron_opd.observe.trajectories import write_trajectories
from megatron_opd.recipe.objective import StepObjective, step_objective
from megatron_opd.recipe.pack import pack, pack_metrics
from megatron_opd.records import Outcome, PackedBatch, Prompt
from megatron_opd.runtime.messages import RefreshReport
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.runtime.wire import encode


@dataclass
class Loop:
    """One run, from the first evaluation, or from where ``progress`` says, to the last evaluation."""

    config: Config
    stages: Stages
    student_sampler: RolloutEngine  # for the evaluation, as the next
    teacher_samplers: dict[str, RolloutEngine]  # by domain
    attention_length: float  # of the student: see recipe.pack.sequence_costs
    stream: Stream
    held_out: Sequence[Prompt]
    board: BatchBoard
    recorder: Recorder
    activity: Activity
    run_directory: RunDirectory
    prompts: str  # fingerprint of those in ``stream``
    progress: Progress = field(default_factory=Progress)
    began: float = field(default_factory=time.time)  # of this process; progress.wall_s is the time before

    def __post_init__(self) -> None:
        self.draws = Draws(self.stream, self.progress.groups, self.progress.in_flight)
        self.buffer = StepBuffer(self._prepare, self.progress.step, self.config.steps)
        every, beside = self.config.evaluation.every_steps, self.config.rollout.max_staleness > 0
        self.evaluations = Evaluations(every, self._evaluate_step, self._skip_evaluation, beside=beside)

    async def run(self) -> bool:
        """Drive the run to its end. False: it was asked to pause, has saved, and goes on when it is started again."""
        gc.freeze()  # libraries stay to the end: to look at their objects again and again costs a tenth of a step
        first = self.progress.step
        start = await self._live(first)
        self.recorder.event("live", **start.model_dump())
        if first == 0 and self.config.evaluation.before:
            await self._evaluate("before", with_teachers=self.config.evaluation.teachers)
        try:
            paused = False
            while not self._is_over() and not paused:
                paused = await self._step(self.progress.step)
                if not self._is_over() and not paused:
                    await self.evaluations.after(self.progress.step)
            await self.evaluations.finish()
        finally:
            await self.buffer.close()
            await self.evaluations.close()
        if paused:
            self.recorder.event("paused", step=self.progress.step)
            return False
        await self._evaluate("after", with_teachers=False)
        return True

    def now(self) -> Progress:
        """How far the run is, with the time that it has taken and the prompts that are not trained yet."""
        return replace(
            self.progress,
            wall_s=self.progress.wall_s + time.time() - self.began,
            groups=self.draws.next_group,
            in_flight=self.draws.in_flight(self.progress.step),
        )

    async def _step(self, step: int) -> bool:
        """One optimizer step, and what must be remembered of it when it is to be saved. Weights ``step`` are live.

        True when the run pauses with it.
        """
        began, clock = time.monotonic(), time.time()
        bound = self.config.rollout.max_staleness
        self.buffer.begin(last=step + bound)
        self.activity.begin(f"step {step + 1}: rollouts", self.config.rollout.prompts_per_step)
        prepared = await self.buffer.take(step)
        lay = buffered_s(prepared)
        rollouts, objective = prepared.rollouts, prepared.objective
        self._check_dropped(rollouts, step)
        self._count(rollouts, objective)
        self.progress.step = step + 1
        paused = not self._is_over() and self.run_directory.pause_wanted.exists()
        last = paused or self._is_over()
        offered = time.monotonic()
        await self.board.publish(step, [encode(replace(batch, last=last, paused=paused)) for batch in prepared.batches])
        self.activity.begin(f"step {step + 1}: training")
        await self._keep_trajectories(step, rollouts, objective)  # while the student trains
        report = await self._live(step + 1)
        ahead = {"perf/ready_steps": self.buffer.ready, "time/buffered_s": lay} if bound else {}
        spent = time.monotonic() - began
        scored = sum(len(item.teacher_logprobs) for item in rollouts.scored)
        times = {"time/collect_s": prepared.seconds, "time/step_s": spent, "perf/tokens_per_s": scored / spent}
        packing = pack_metrics(prepared.batches, self.config.student.row_tokens, self.attention_length)
        metrics = step_metrics(step, rollouts, objective, report) | packing | ahead
        record_timeline(
            self.recorder,
            step + 1,
            rollouts.times,
            began=clock,
            offered=clock + offered - began,
            live=clock + spent,
            train_s=report.training["time/train_s"],
            refresh_s=report.refresh_s,
        )
        self.recorder.step(step + 1, metrics | times)
        if self.config.checkpoint.due(step + 1, last=last):
            # After the step's line and rollouts are on disk: a checkpoint that is whole has everything before it.
            folder = self.run_directory.checkpoints.coordinator_state(step + 1)
            await asyncio.to_thread(write, folder, self.now(), self.stream.state(), self.prompts)
        return paused

    async def _live(self, version: int) -> RefreshReport:
        """Wait for weights to be live; engines that do not have them get no requests until they do."""
        report = await self.board.live(version)
        self.progress.refreshes.add(report)
        self.stages.engine.replicas.follow(report.out)
        if report.out:
            self.recorder.event("engines_out", version=version, reasons=report.out)
        return report

    async def _prepare(self, step: int) -> Prepared:
        """Rollouts of a step and what the recipe makes of them, packed."""
        began = time.monotonic()
        rollouts = await self.stages.collect(partial(self.draws.take, step), step)
        objective, batches = await asyncio.to_thread(self._objective, rollouts, step)
        now = time.monotonic()
        return Prepared(rollouts, objective, batches, now - began, now)

    def _objective(self, rollouts: StepRollouts, step: int) -> tuple[StepObjective, list[PackedBatch]]:
        objective = step_objective(rollouts.scored, np.array(rollouts.balanced, dtype=bool), self.config, step)
        shape = (self.config.student.row_tokens, self.config.student.data_parallel, self.attention_length)
        return objective, pack(objective.samples, *shape, version=step, last=False)  # the loop knows the last step

    def _is_over(self) -> bool:
        """Whether the steps done so far are all."""
        limit = self.config.max_generated_tokens
        enough = limit is not None and self.progress.totals.sampled >= limit
        return enough or self.progress.step >= self.config.steps

    def _check_dropped(self, rollouts: StepRollouts, step: int) -> None:
        dropped, stale = [drop for _, drop in rollouts.dropped], [drop for _, drop in rollouts.stale]
        if dropped or stale:
            self.recorder.event("dropped", step=step + 1, reasons=drop_reasons(dropped + stale))
        asked = len(rollouts.scored) + len(dropped)
        check_dropped_share(dropped, asked, self.config.scoring.max_dropped_share)

    def _count(self, rollouts: StepRollouts, objective: StepObjective) -> None:
        """Add the step to the totals, and its outcomes to what is known of the prompts."""
        sampled = sum(len(item.rollout.token_ids) for item in rollouts.verified)
        self.progress.totals.generated += sampled + sum(len(rollout.token_ids) for rollout, _ in rollouts.stale)
        self.progress.totals.sampled += sampled
        self.progress.totals.scored += sum(len(item.teacher_logprobs) for item in rollouts.scored)
        self.progress.totals.trained += sum(int((sample.weights > 0).sum()) for sample in objective.samples)
        self.stream.observe([(item.rollout.prompt.id, item.outcome) for item in rollouts.verified])

    async def _keep_trajectories(self, step: int, rollouts: StepRollouts, objective: StepObjective) -> None:
        every = self.config.record.trajectories_every
        if every and step % every == 0:
            await asyncio.to_thread(
                write_trajectories,
                self.run_directory.trajectories / f"step_{step + 1:06d}.parquet",
                step + 1,
                objective.rollouts,
                rollouts.unscored,
                rollouts.dropped,
                rollouts.stale,
            )
        await asyncio.to_thread(self._write_pass_rates)

    def _write_pass_rates(self) -> None:
        known = self.stream.known()
        if known is None:  # a streamed file: there may be more prompts than memory holds
            return
        write_pass_rates(
            self.run_directory.pass_rates,
            [prompt.id for prompt in known.prompts],
            [prompt.domain for prompt in known.prompts],
            known.graded,
            known.graded,
            known.passes,
            model=str(self.config.student.model),
            settings={
                "temperature": 1.0,
                "max_new_tokens": self.config.rollout.max_new_tokens,
                "policy": "in training",
            },
        )

    async def _evaluate(self, when: str, *, with_teachers: bool) -> None:
        if not self.held_out:
            return
        self.recorder.event("evaluating", when=when, prompts=len(self.held_out))
        jobs = {when: self._grade(self.student_sampler, self.held_out)}
        for domain, sampler in self.teacher_samplers.items() if with_teachers else ():
            jobs[f"teacher {domain}"] = self._grade(sampler, [item for item in self.held_out if item.domain == domain])
        asked = len(self.held_out) * (2 if with_teachers else 1)  # each teacher gets its own domain
        self.activity.begin(f"evaluating {when} training", asked)
        results = dict(zip(jobs, await asyncio.gather(*jobs.values()), strict=True))
        self._write_evaluation(when, results[when])
        for name, graded in results.items():
            kind = when if name == when else "teacher"
            found = self._record_evaluation(self.progress.step, name, graded)
            self.progress.evaluations[kind] = self.progress.evaluations.get(kind, {}) | found

    async def _evaluate_step(self, step: int) -> None:
        """The student after so many steps; where training goes on meanwhile, newer weights may take over."""
        beside = self.config.rollout.max_staleness > 0
        self.recorder.event("evaluating", when=f"after step {step} of", prompts=len(self.held_out))
        if not beside:
            self.activity.begin(f"evaluating after step {step}", len(self.held_out))
        graded = await self._grade(self.student_sampler, self.held_out, beside=beside)
        self._write_evaluation(f"step_{step:06d}", graded)
        self._record_evaluation(step, "during", graded)

    def _skip_evaluation(self, step: int) -> None:
        self.recorder.event("evaluation_skipped", step=step)

    def _record_evaluation(self, step: int, name: str, graded: Sequence[Graded]) -> dict[str, Accuracy]:
        """name: "before", "during", "after", or "teacher <domain>"."""
        found = accuracies(graded)
        shares = {domain: accuracy.value for domain, accuracy in found.items()}
        errors = {domain: accuracy.standard_error for domain, accuracy in found.items()}
        weights = (min(item.versions[0] for item in graded), max(item.versions[1] for item in graded))
        self.recorder.evaluated(step, name, shares, errors, weights)
        return found

    async def _grade(self, engine: RolloutEngine, prompts: Sequence[Prompt], *, beside: bool = False) -> list[Graded]:
        """beside: training goes on meanwhile, whose activity is shown, and which needs the engine too."""
        verifiers, most = self.stages.verifiers, self.config.evaluation.concurrency
        if beside:
            graded = await evaluate(engine, verifiers, prompts, self.config, most=most)
        else:
            graded = await evaluate(engine, verifiers, prompts, self.config, self.activity.advance)
        self.progress.totals.generated += sum(item.tokens for item in graded)
        return graded

    def _write_evaluation(self, when: str, graded: Sequence[Graded]) -> None:
        """Passes of each held-out prompt, so that any part of them can be looked at later."""
        write_pass_rates(
            self.run_directory.evaluation(when),
            [item.prompt.id for item in graded],
            [item.prompt.domain for item in graded],
            [len(item.outcomes) for item in graded],
            [sum(outcome != Outcome.UNKNOWN for outcome in item.outcomes) for item in graded],
            [item.outcomes.count(Outcome.CORRECT) for item in graded],
            model=str(self.config.student.model),
            settings=self.config.evaluation.model_dump() | {"when": when},
        )
