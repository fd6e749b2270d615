"""The ranks of the tests of a multimodal student's files: conversions, and checkpoints of training.

Usage: vision_files_worker.py WORK_FOLDER, with the models in WORK_FOLDER/models
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checkpoint_worker import ENDPOINTS, leave_coordinator_state, state
from convert_worker import empty
from forked import run_layouts
from megatron.core import parallel_state
from student_case import denominator_of
from student_worker import everywhere, exported
from vision_case import Seen, pack_seen
from vision_files_case import CONVERTED, KINDS, LOADS, SHARD, TRAINED, TRAINED_KIND
from vision_worker import config_of

from megatron_opd.config import CheckpointConfig, Config, ConversionConfig, LossConfig
from megatron_opd.runtime.checkpoints import read_manifest, write_manifest
from megatron_opd.runtime.conversion import SIDE_FILES, ConversionJob
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.student import checkpoint
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.convert import convert
from megatron_opd.student.hf_weights import weights_dtype
from megatron_opd.student.step import train_step


def main() -> None:
    work = Path(sys.argv[1])
    converted = {name: ConversionConfig(**sizes).student(work, "float32").ranks for name, sizes in CONVERTED.items()}
    trained = {name: config_of(work, sizes, train_vision=False).world_size for name, sizes in TRAINED.items()}
    run_layouts(trained, lambda name: train(work, name), work)
    run_layouts(trained, lambda name: resume(work, name), work)
    run_layouts(converted, lambda name: to_megatron(work, name), work)
    run_layouts(converted, lambda name: to_hf(work, name), work)


# ------------------------------------------------------------------ conversions


def to_megatron(work: Path, name: str) -> None:
    """A checkpoint of each model."""
    options = ConversionConfig(**CONVERTED[name])
    init_distributed(options.student(work, "float32"), seed=0, timeout_s=100)
    for kind in KINDS:
        model, target = work / "models" / kind, empty(work / "megatron" / f"{kind}-{name}")
        student = options.student(model, weights_dtype(model))
        convert(ConversionJob(to="megatron", student=student, target=target, events=work / "events.jsonl"))
        if dist.get_rank() == 0:
            write_manifest(target, "converted", 0, checkpoint.layout())
    dist.destroy_process_group()


def to_hf(work: Path, name: str) -> None:
    """An export of each model, from the checkpoints of all layouts and of training."""
    options = ConversionConfig(**CONVERTED[name])
    init_distributed(options.student(work, "float32"), seed=0, timeout_s=100)
    sources = {f"{kind}-{other}": work / "megatron" / f"{kind}-{other}" for kind in KINDS for other in CONVERTED}
    cases = [(source, folder, folder / SIDE_FILES) for source, folder in sources.items()]
    for learning in ("frozen", "learning"):
        run = RunDirectory(work / f"tp2-{learning}")
        cases.append((f"trained-{learning}", run.checkpoints.folder(1), work / "models" / TRAINED_KIND))
    for source, folder, model in cases:
        target = empty(work / "hf" / f"{source}-{name}")
        convert(
            ConversionJob(
                to="hf",
                student=options.student(model, "float32"),
                checkpoint=folder,
                saved_tensor_parallel=read_manifest(folder).layout["tensor"],
                target=target,
                shard_bytes=SHARD,
                events=target / "events.jsonl",
            )
        )
    dist.destroy_process_group()


# --------------------------------------------------------------------- training


def train(work: Path, name: str) -> None:
    """A step, a checkpoint, and another step, with a frozen tower and with one that learns."""
    result = {}
    for number, learning in enumerate(("frozen", "learning")):
        config = begin(work, name, learning, seed=number)
        run = RunDirectory(work / f"{name}-{learning}")
        if dist.get_rank() == 0:
            run.path.mkdir()
            run.start(config, ENDPOINTS, 0)
        dist.barrier()
        student = build_student(config)
        if learning == "frozen":  # it must come from the checkpoint, and not from where the run began
            for parameter in student.model[0].parameters():
                parameter.data.mul_(1.0 if parameter.requires_grad else 1.5)
        step(student, work)
        found = state(student) | {"parameters": everywhere(parameters(student))}
        leave_coordinator_state(run, 1)
        checkpoint.Saver(CheckpointConfig(async_save=False), run, student).begin(1)
        result[learning] = found | {"next": step(student, work), "after": exported(student)}
    finish(work / f"{name}.saved", result)


def resume(work: Path, name: str) -> None:
    """What other layouts saved."""
    result = {}
    for other in LOADS[name]:
        for learning in ("frozen", "learning"):
            config = begin(work, name, learning, seed=9)
            run = RunDirectory(work / f"{other}-{learning}")
            student = build_student(config)
            checkpoint.load_student(student, run.checkpoints.folder(1), 1, run.checkpoints.check(1).layout)
            found = state(student)
            result[other, learning] = found | {"next": step(student, work), "after": exported(student)}
    finish(work / f"{name}.loaded", result)


def begin(work: Path, name: str, learning: str, seed: int) -> Config:
    config = config_of(work / "models" / TRAINED_KIND, TRAINED[name], train_vision=learning == "learning")
    if not dist.is_initialized():
        init_distributed(config.student, seed=seed, timeout_s=100)
    return config


def step(student: Student, work: Path) -> dict[str, Any]:
    seen: list[Seen] = pickle.loads((work / "samples").read_bytes())
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    rows = [[index] for index in range(len(seen))][rank::copies]
    batch = pack_seen(seen, rows, denominator_of([one.sample for one in seen]))
    return dataclasses.asdict(train_step(student, batch, LossConfig()))


def parameters(student: Student) -> tuple[int, int]:
    """How many of this rank's learn, and how many do not."""
    sizes = [(each.numel(), each.requires_grad) for chunk in student.model for each in chunk.parameters()]
    return sum(size for size, learns in sizes if learns), sum(size for size, learns in sizes if not learns)


def finish(path: Path, result: dict[Any, Any]) -> None:
    if dist.get_rank() == 0:
        path.write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
