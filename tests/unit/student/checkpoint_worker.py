"""The ranks of the checkpoint tests: under each layout they train, save and go on; then others load that and go on.

Usage: checkpoint_worker.py WORK_FOLDER '{"tp2": {"tensor_parallel": 2}, ...}' '{"tp2": ["tp1", "tp2"], ...}'
The last argument tells whose checkpoints each layout loads.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from forked import run_layouts
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from student_case import denominator_of, kinds_of, make_config, pack
from student_worker import exported, splits

from megatron_opd.config import CheckpointConfig, Config, LossConfig
from megatron_opd.observe.recorder import read_events
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.student import checkpoint, thread_writer
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.step import train_step

ENDPOINTS = Endpoints("http://a:1", ["http://b:2"], {"math": ["http://c:3"]}, [], "127.0.0.1", 4)
SCHEDULE = {"schedule": "linear", "min_lr": 1e-3}


def main() -> None:
    work, layouts, loads = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    ranks = {name: make_config(work, **sizes).world_size for name, sizes in layouts.items()}
    run_layouts(ranks, lambda name: run_layout(work, name, layouts[name], None), work)
    run_layouts(ranks, lambda name: run_layout(work, name, layouts[name], loads[name]), work)


def run_layout(work: Path, layout: str, sizes: dict[str, Any], loads: list[str] | None) -> None:
    """Save, or load what ``loads`` names; rank 0 leaves what it found."""
    kind = kinds_of(layout)[0]
    config = make_config(work / kind, **sizes)
    config = config.model_copy(update={"optimizer": config.optimizer.model_copy(update=SCHEDULE)})
    # Another one for each layout, and each time: what is loaded must not come from it.
    init_distributed(config.student, seed=sum(map(ord, layout)) + (loads is None), timeout_s=100)
    samples = pickle.loads((work / f"{kind}.samples").read_bytes())
    run = RunDirectory(work / layout)
    if loads is None:
        if dist.get_rank() == 0:
            run.path.mkdir()
            run.start(config, ENDPOINTS, 0)
        dist.barrier()
        result: dict[str, Any] = save(config, run, samples) | {"events": read_events(run.events)}
    else:
        result = {other: load(config, RunDirectory(work / other), samples) for other in loads}
    if dist.get_rank() == 0:
        (work / f"{layout}.{'saved' if loads is None else 'loaded'}").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def save(config: Config, run: RunDirectory, samples: list) -> dict[str, Any]:
    """Two steps, a save in the background while a third goes on, and saves that fail afterwards."""
    student = build_student(config)
    settings = CheckpointConfig(every_steps=1, keep_last=10, deadline_s=30)
    for _ in range(2):
        step(student, samples)
    found = state(student)
    random = torch.get_rng_state()
    leave_coordinator_state(run, 2)
    saver = checkpoint.Saver(settings, run, student)
    saver.begin(2)
    found |= {"next": step(student, samples), "after": exported(student), "random": random}
    step(student, samples)
    saver.finish()
    if config.student.tensor_parallel == config.world_size == 2:
        fail(settings, run, student)
    return found


def fail(settings: CheckpointConfig, run: RunDirectory, student: Student) -> None:
    """A writer that fails on one rank, one that never ends, a coordinator that is gone, a folder in the way."""
    working = thread_writer._Writer.write_data
    leave_coordinator_state(run, 3)
    if dist.get_rank() == 1:
        thread_writer._Writer.write_data = disk_full
    checkpoint.Saver(settings.model_copy(update={"async_save": False}), run, student).begin(3)

    hasty = checkpoint.Saver(settings.model_copy(update={"deadline_s": 1.0}), run, student)
    leave_coordinator_state(run, 4)
    if dist.get_rank() == 1:
        thread_writer._Writer.write_data = lambda *_: time.sleep(600)
    hasty.begin(4)
    hasty.finish()
    thread_writer._Writer.write_data = working
    lonely = checkpoint.Saver(
        settings.model_copy(update={"deadline_s": 8.0}), run, student
    )  # time to write, even if busy
    lonely.begin(5)  # nobody leaves a coordinator's state
    lonely.finish()
    blocker = run.checkpoints.unfinished(6)
    if dist.get_rank() == 0:
        blocker.write_text("a file where the folder should be")
    lonely.begin(6)
    if dist.get_rank() == 0:
        blocker.unlink()
    leave_coordinator_state(run, 7)
    saver = checkpoint.Saver(settings, run, student)
    saver.begin(7)
    saver.finish()


def disk_full(*_: object) -> list:
    raise OSError(28, "No space left on device")


def leave_coordinator_state(run: RunDirectory, number: int) -> None:
    if dist.get_rank() == 0:
        folder = run.checkpoints.coordinator_state(number)
        folder.mkdir()
        (folder / "state.json").write_text(str(number))
    dist.barrier()


def load(config: Config, run: RunDirectory, samples: list) -> dict[str, Any]:
    """A new student that goes on from the checkpoint of another layout, for two steps."""
    student = build_student(config)
    manifest = run.checkpoints.check(2)
    checkpoint.load_student(student, run.checkpoints.folder(2), 2, manifest.layout)
    found = state(student)
    found |= {"random": torch.get_rng_state(), "layout": manifest.layout}
    return found | {"next": step(student, samples), "after": exported(student)}


def step(student: Student, samples: list) -> dict[str, float]:
    rows = splits(samples)["row_each"]
    return dataclasses.asdict(train_step(student, pack(samples, rows, denominator_of(samples)), LossConfig()))


def state(student: Student) -> dict[str, Any]:
    """Weights, and both moments of Adam under the names of the weights."""
    found = {"weights": exported(student)}
    parameters = [parameter for chunk in student.model for parameter in chunk.parameters()]
    kept = [parameter.data.clone() for parameter in parameters]
    for moment in ("exp_avg", "exp_avg_sq"):
        for optimizer in student.optimizer.chained_optimizers:
            put_in_place_of_weights(optimizer, moment)
        found[moment] = exported(student)
    for parameter, data in zip(parameters, kept, strict=True):
        parameter.data.copy_(data)
    return found


def put_in_place_of_weights(optimizer: DistributedOptimizer, moment: str) -> None:
    gathered = optimizer.get_parameter_state_dp_zero(return_on_all_ranks=True)
    for number, buffer in enumerate(optimizer.buffers):
        (tensors,) = gathered[number].values()
        for parameter, (start, end, _) in buffer.param_index_map.items():
            parameter.data.copy_(tensors[moment][start:end].view_as(parameter))


if __name__ == "__main__":
    main()
