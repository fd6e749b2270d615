"""A run whose engine, teachers, verifiers and student only wait: the coordinator's loop is the real one.

An engine and a teacher have slots, as many requests as they serve at once, and take a known time for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rollouts import recipe

from megatron_opd.config import Config
from megatron_opd.coordinator.app import BatchBoard
from megatron_opd.coordinator.loop import Loop
from megatron_opd.coordinator.stages import Stages
from megatron_opd.coordinator.state import Progress, read
from megatron_opd.data.stream import PromptStream, fingerprint
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.recorder import Recorder
from megatron_opd.records import Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.runtime.messages import RefreshReport
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.runtime.wire import decode
from megatron_opd.verifiers.base import Verdict


class SlowServer:
    """``slots`` requests at once, ``seconds`` each."""

    def __init__(self, slots: int, seconds: float) -> None:
        self.busy_s, self.seconds = 0.0, seconds
        self._slots = asyncio.Semaphore(slots)

    async def serve(self, begun: Callable[[], None] = lambda: None) -> None:
        async with self._slots:
            begun()
            await asyncio.sleep(self.seconds)
            self.busy_s += self.seconds


class SlowEngine:
    """One request is one group. A response of 4 tokens sees the weights at its start and those at its end, half each.

    ``version_of`` says which weights a group sees while ``version`` is live: an engine that is out of date lies here.
    """

    replicas = type("Replicas", (), {"where": "http://engine", "follow": staticmethod(lambda out: None)})

    def __init__(self, server: SlowServer) -> None:
        self.server, self.version = server, 0
        self.version_of: Callable[[Prompt, int], int] = lambda prompt, live: live
        self.asked: list[str] = []

    async def sample_group(
        self, prompt: Prompt, group: int, samples: int, max_new_tokens: int, **_: object
    ) -> list[Rollout]:
        self.asked.append(prompt.id)
        seen: list[int] = []
        await self.server.serve(lambda: seen.append(self.version_of(prompt, self.version)))
        versions = np.repeat([seen[0], self.version_of(prompt, self.version)], 2)
        ids, logprobs = np.arange(7, 11), np.full(4, -0.5, np.float32)
        return [Rollout(prompt, group, ids, logprobs, versions, "stop", f"{prompt.id}-{i}") for i in range(samples)]


class InstantVerifiers:
    """One or two of four responses are right."""

    async def verify(self, prompt: Prompt, response: str) -> Verdict:
        parity, _, number = response.removeprefix("p").rpartition("-")
        return Verdict(Outcome(int(int(number) % 4 <= int(parity) % 2)), "as told")


class SlowTeachers:
    """One request is one response."""

    def __init__(self, server: SlowServer) -> None:
        self.server = server

    async def score(self, verified: Verified) -> Scored:
        await self.server.serve()
        return Scored(verified, "math", np.full(len(verified.rollout.token_ids), -0.25, np.float32))


@dataclass
class SlowStudent:
    """Trains for ``seconds``, of which the refresh is a part, and then the engine has the next weights."""

    board: BatchBoard
    engine: SlowEngine
    seconds: float
    first: int = 0
    finished: list[float] = field(default_factory=list)  # when each step ended
    most_lag: list[int] = field(default_factory=list)  # largest lag of each step's tokens

    async def train(self) -> None:
        step, last, clock = self.first, False, asyncio.get_running_loop().time
        await self.report(step)
        while not last:
            body = await self.board.batch(step, 0, 1e6)
            if not body:
                return
            batch = decode(body)
            assert batch.version == step
            await asyncio.sleep(self.seconds)
            self.finished.append(clock())
            self.most_lag.append(int(batch.lags[batch.weights > 0].max(initial=0)))
            step, last = step + 1, batch.last
            await self.report(step)

    async def report(self, version: int) -> None:
        self.engine.version = version
        training = {"time/train_s": self.seconds} if version > self.first else {}
        report = RefreshReport(version=version, refresh_s=0.0, refresh_bytes=1, probe_difference=0.0, training=training)
        assert await self.board.refreshed(report)


@dataclass(frozen=True)
class Times:
    """Seconds of one step in each stage when it is alone."""

    generate: float
    score: float
    train: float
    slots: int = 8


class FakeWorld:
    """One run in ``folder``. Make and drive it inside one event loop; ``resume_from`` is a step that was saved."""

    def __init__(
        self, folder: Path, times: Times, *overrides: str, prompts: int = 1000, held_out: int = 0, resume_from: int = 0
    ) -> None:
        self.config = _config(folder, *overrides)
        rollout = self.config.rollout
        groups = rollout.prompts_per_step
        self.engine = SlowEngine(SlowServer(times.slots, times.generate * times.slots / groups))
        samples = groups * rollout.samples_per_prompt
        self.teachers = SlowTeachers(SlowServer(times.slots, times.score * times.slots / samples))
        self.run = RunDirectory(self.config.run_dir)
        if not resume_from:
            self.run = RunDirectory.create(self.config, Endpoints("", [], {}, [], "", 0))
        known = [Prompt(f"p{i}", "math", "?", (5, 6), "1") for i in range(prompts)]
        stream, progress = PromptStream(known, self.config.seed), Progress()
        if resume_from:
            progress, state = read(self.run.checkpoints.coordinator_state(resume_from), fingerprint(known))
            stream.restore(state)
        self.board = BatchBoard(resume_from)
        self.student = SlowStudent(self.board, self.engine, times.train, resume_from)
        stages = Stages(self.engine, InstantVerifiers(), self.teachers, rollout, self.config.balance, self.config.seed)
        self.loop = Loop(
            config=self.config,
            stages=stages,
            student_sampler=self.engine,
            teacher_samplers={},
            attention_length=1000.0,
            stream=stream,
            held_out=[Prompt(f"p{prompts + i}", "math", "?", (5, 6), "1") for i in range(held_out)],
            board=self.board,
            recorder=Recorder(self.run.events, self.run.metrics),
            activity=Activity(self.run.activity),
            run_directory=self.run,
            prompts=fingerprint(known),
            progress=progress,
        )

    async def drive(self) -> None:
        """Both sides, to the end of the run."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.student.train())
            group.create_task(self.loop.run())


def _config(folder: Path, *overrides: str) -> Config:
    fixed = [f"output={folder}", "name=fake", "existing=refuse", "refresh.pause=retract"]
    return recipe(*fixed, "checkpoint.every_steps=1", *overrides)
