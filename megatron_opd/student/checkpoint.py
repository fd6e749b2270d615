"""Saving the student and loading it under any parallel layout.

Weights, optimizer state and schedule are written by Megatron's dist_checkpointing ("torch_dist"), where every tensor
has its global shape, so that any layout can read them; random states lie beside them, one file for each rank.

Megatron plans a save with all ranks and would then hand the writing to forked processes, for whose results it waits
for ever: one that dies hangs the job, and forking beside running threads is a gamble. Here each rank copies its tensors
to main memory and one thread of it writes them. Nothing but files is touched by that thread; everything that ranks do
together happens between steps, where they agree on whether all have written, one has failed, or the deadline is past.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from safetensors.torch import load_file, save_file

from megatron_opd.config import CheckpointConfig
from megatron_opd.observe.recorder import Recorder
from megatron_opd.runtime.checkpoints import COORDINATOR, FileDigest, digest
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.student.build import Student
from megatron_opd.student.thread_writer import ThreadedSave

logger = logging.getLogger("megatron_opd.student")

POLL_S = 0.05
# Optimizer state by parameter, whatever the layout; gathered in main memory on the first data-parallel rank.
METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
    "chained_optim_avoid_prefix": True,
}


class Saver:
    """Saves one run's student, one checkpoint at a time. All ranks make it and call every method at the same steps."""

    def __init__(self, config: CheckpointConfig, run: RunDirectory, student: Student) -> None:
        self._config, self._run, self._student = config, run, student
        self._folder = run.checkpoints
        self._recorder = Recorder(run.events, run.metrics)
        self._save: _Save | None = None

    def begin(self, step: int) -> None:
        """Start to save the state after ``step`` steps; with ``async_save`` it is finished between later steps."""
        self.finish()
        began = time.monotonic()
        folder = self._folder.unfinished(step)
        problem = _on_rank_0(lambda: self._folder.begin(step))
        if problem:
            self._fail(step, problem)
            return
        state = sharded_state(self._student, step)
        request = dist_checkpointing.save(state, str(folder), ThreadedSave(), async_sharded_save=True)
        writer = _Writer(request, folder, random_state(self._student))
        writer.start()
        self._save = _Save(step, began, request, writer, waited_s=time.monotonic() - began)
        if not self._config.async_save:
            self.finish()

    def poll(self) -> None:
        """Between two steps: complete the save under way if every rank has written, give it up if one cannot."""
        if self._save is None:
            return
        began = time.monotonic()
        save, found = self._save, _everywhere(self._state(self._save))
        problems = [state.problem for state in found if state.problem]
        waiting = [what for state in found for what in state.waiting]
        if waiting and not problems and any(state.late for state in found):
            problems = [f"after checkpoint.deadline_s = {self._config.deadline_s:g} s {', '.join(waiting)}"]
        if problems:
            self._save = None
            self._fail(save.step, "; ".join(problems))
        elif waiting:
            save.waited_s += time.monotonic() - began
        else:
            self._save = None
            self._complete(save, began)

    def finish(self) -> None:
        """Wait for the save under way, for at most its deadline."""
        self.poll()
        while self._save is not None:
            time.sleep(POLL_S)
            self._save.waited_s += POLL_S
            self.poll()

    def _state(self, save: _Save) -> _State:
        rank, writer = dist.get_rank(), save.writer
        waiting = [] if writer.done else [f"rank {rank} was still writing"]
        if rank == 0 and not self._folder.coordinator_state(save.step).is_dir():
            waiting.append("the coordinator had not left its state")  # it comes after its records of the step
        problem = f"rank {rank}: {writer.problem}" if writer.problem else None
        return _State(problem, waiting, time.monotonic() - save.began > self._config.deadline_s)

    def _complete(self, save: _Save, began: float) -> None:
        for finalize in save.request.finalize_fns:
            finalize()
        digests = {name: file for part in _everywhere(save.writer.digests) for name, file in part.items()}
        problem = _on_rank_0(lambda: self._commit(save, digests, began))
        if problem:
            self._fail(save.step, problem)

    def _commit(self, save: _Save, digests: dict[str, FileDigest], began: float) -> None:
        folder, config = self._folder, self._config
        folder.coordinator_state(save.step).rename(folder.unfinished(save.step) / COORDINATOR)
        manifest = folder.commit(save.step, self._run.identity(), layout(), digests)
        folder.prune(config.keep_last, config.keep_every)
        now = time.monotonic()
        self._recorder.event(
            "checkpoint",
            step=save.step,
            bytes=manifest.bytes,
            seconds=round(now - save.began, 3),
            waited_s=round(save.waited_s + now - began, 3),
        )

    def _fail(self, step: int, problem: str) -> None:
        """Tell it and go on: the checkpoint before stays the newest."""
        if dist.get_rank() == 0:
            self._folder.abandon(step)
            error = f"The checkpoint of step {step} was not written, and the one before it stays: {problem}"
            logger.warning(error)
            self._recorder.event("checkpoint_failed", step=step, error=error)


@dataclass(frozen=True)
class _State:
    """How far one rank's part of a save is."""

    problem: str | None  # why it will never be done
    waiting: list[str]  # for what; empty when it is done
    late: bool


@dataclass
class _Save:
    """A save under way."""

    step: int
    began: float
    request: AsyncRequest  # finalize_fns: what all ranks do together when all have written
    writer: _Writer
    waited_s: float  # time that training stood still for it


@dataclass
class _Writer:
    """The thread that writes one rank's part, of which what the student does later changes nothing."""

    request: AsyncRequest
    folder: Path
    random: dict[str, torch.Tensor]
    digests: dict[str, FileDigest] = field(default_factory=dict)
    problem: str | None = None
    done: bool = False

    def start(self) -> None:
        """Write in the background. A daemon: a disk that never answers does not keep the process alive."""
        threading.Thread(target=self._run, daemon=True, name="checkpoint").start()

    def _run(self) -> None:
        try:
            own = self.folder / random_file(dist.get_rank())
            save_file(self.random, own)
            self.digests = {path.name: digest(path) for path in [*self.request.async_fn(), own]}
            self.done = True
        except Exception as error:  # noqa: BLE001 - whatever it is, the other ranks must hear of it
            self.problem = f"{type(error).__name__}: {error}"


def load_student(student: Student, folder: Path, step: int, saved_layout: dict[str, int]) -> None:
    """Load the checkpoint in ``folder``, of ``step`` steps, whatever layout it was saved under. All ranks call it.

    Random states are loaded under the layout that they were saved under; another one keeps those of its start, which
    nothing in training draws from.
    """
    for part in _parts(student):
        _allocate(part.optimizer)
    loaded = dist_checkpointing.load(sharded_state(student, step, loading=True), str(folder))
    for name, chunk in _chunks(student):
        chunk.module.load_state_dict(loaded[name])
    parts, found = _parts(student), loaded["optimizer"]
    for number, part in enumerate(parts):
        _load_optimizer(part, found if len(parts) == 1 else found[number], step)
    student.scheduler.num_steps = 0  # the schedule is the config's, which may have more steps than the saved one
    student.scheduler.step(step)
    if saved_layout == layout():
        set_random_state(student, load_file(folder / random_file(dist.get_rank())))


def sharded_state(student: Student, step: int, *, loading: bool = False) -> dict[str, Any]:
    """Everything that makes the student, each tensor with its place in the global one."""
    state: dict[str, Any] = {
        name: chunk.module.sharded_state_dict(metadata=METADATA) for name, chunk in _chunks(student)
    }
    state["optimizer"] = student.optimizer.sharded_state_dict(state, is_loading=loading, metadata=METADATA)
    return state | {
        "iteration": step,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": student.scheduler.state_dict(),
    }


def layout() -> dict[str, int]:
    """Parallel sizes of this job."""
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
    }


def random_file(rank: int) -> str:
    """Name of the file with one rank's random states."""
    return f"random_{rank:05d}.safetensors"


def random_state(student: Student) -> dict[str, torch.Tensor]:
    """Random states of this rank: of the CPU, and of the GPU where there is one."""
    states = {"cpu": torch.get_rng_state()}
    if student.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state().cpu()
    return states


def set_random_state(student: Student, states: dict[str, torch.Tensor]) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(states["cpu"])
    if student.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])


def _chunks(student: Student) -> list[tuple[str, Any]]:
    """Model chunks of this rank by Megatron's names for them."""
    if len(student.model) == 1:
        return [("model", student.model[0])]
    return [(f"model{number}", chunk) for number, chunk in enumerate(student.model)]


def _parts(student: Student) -> list[DistributedOptimizer]:
    optimizer = student.optimizer
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def _load_optimizer(part: DistributedOptimizer, found: dict[str, Any], step: int) -> None:
    """``part.load_state_dict`` with moments that were found in a checkpoint.

    Groups of parameters are this job's, not the checkpoint's: learning rates and weight decay are the config's, and
    another layout may have other groups (under expert parallelism, experts have an optimizer of their own). Nor does
    Megatron's loading get along with torch's Adam: it looks for the count of steps among the moments, and lets all
    parameters share one tensor of it, which each would then count up.
    """
    state = part.state_dict()
    for group in state["optimizer"]["param_groups"]:
        group["step"] = step
    part.load_state_dict(state)
    inner = part.optimizer.state
    steps = {parameter: own.pop("step") for parameter, own in inner.items() if "step" in own}
    part.load_parameter_state_from_fully_reshardable(found["param_state"])
    for parameter, count in steps.items():
        inner[parameter]["step"] = count.clone()


def _allocate(inner: torch.optim.Optimizer) -> None:
    """Give torch's Adam the state that it makes in its first step: Megatron cannot load into one that has none."""
    if not isinstance(inner, torch.optim.Adam):
        return
    for group in inner.param_groups:
        for parameter in group["params"]:
            inner.state[parameter] = {
                "step": torch.zeros(()),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }


def _everywhere(item: Any) -> list[Any]:
    """What each rank has, in their order."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


def _on_rank_0(work: Any) -> str | None:
    """Do file work on rank 0; every rank learns what went wrong, if anything."""
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            work()
        except OSError as error:
            problem = [f"{type(error).__name__}: {error}"]
    dist.broadcast_object_list(problem, src=0)
    return problem[0]
