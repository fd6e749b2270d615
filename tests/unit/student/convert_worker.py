"""The ranks of the conversion's tests: each layout makes a checkpoint of each model, and exports what others made.

Usage: convert_worker.py WORK_FOLDER, with the models in WORK_FOLDER/models
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from checkpoint_worker import ENDPOINTS, leave_coordinator_state
from convert_case import LAYOUTS, RUN_LAYOUT, WRONG, kinds_of, sources_of
from forked import run_layouts
from safetensors.torch import save_file
from student_case import denominator_of, make_config, make_samples, pack
from student_worker import exported, splits
from transformers import AutoModelForCausalLM

from megatron_opd.config import CheckpointConfig, ConversionConfig, LossConfig
from megatron_opd.errors import CheckpointError
from megatron_opd.runtime.checkpoints import read_manifest, write_manifest
from megatron_opd.runtime.conversion import SIDE_FILES, ConversionJob
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.student.build import build_student, init_distributed
from megatron_opd.student.checkpoint import Saver, layout
from megatron_opd.student.convert import convert
from megatron_opd.student.hf_weights import weights_dtype
from megatron_opd.student.step import train_step


def main() -> None:
    work = Path(sys.argv[1])
    ranks = {name: ConversionConfig(**sizes).student(work, "float32").ranks for name, sizes in LAYOUTS.items()}
    run_layouts(ranks, lambda name: make(work, name), work)
    run_layouts(ranks, lambda name: export(work, name), work)
    run_layouts({"run": 2}, lambda _: train(work), work)


def make(work: Path, name: str) -> None:
    """A checkpoint of each model."""
    start(work, name)
    for kind in kinds_of(name):
        target = work / "megatron" / f"{kind}-{name}"
        convert(to_megatron(work, name, kind, target))
        if dist.get_rank() == 0:
            write_manifest(target, "converted", 0, layout())
    dist.destroy_process_group()


def export(work: Path, name: str) -> None:
    """An export of each model, from the checkpoints of some layouts; what is said where it is another's checkpoint."""
    start(work, name)
    for kind in kinds_of(name):
        for source in sources_of(name):
            checkpoint, target = work / "megatron" / f"{kind}-{source}", work / "hf" / f"{kind}-{source}-{name}"
            convert(to_hf(name, checkpoint / SIDE_FILES, checkpoint, target, 30_000 if source == name else 2**30))
    if name == "tp2":
        for kind in ("qwen2", *WRONG):
            try:
                convert(to_hf(name, work / "models" / kind, work / "megatron" / "untied-tp2", work / kind, 2**30))
            except CheckpointError as error:
                (work / f"{kind}.txt").write_text(str(error))
    dist.destroy_process_group()


def train(work: Path) -> None:
    """A checkpoint of a training run, and the weights that it must hold."""
    folder = work / "models" / "untied"
    config = make_config(folder, **RUN_LAYOUT)
    init_distributed(config.student, seed=0, timeout_s=100)
    student = build_student(config)
    samples = make_samples(AutoModelForCausalLM.from_pretrained(folder))
    train_step(student, pack(samples, splits(samples)["row_each"], denominator_of(samples)), LossConfig())
    run = RunDirectory(work / "run")
    if dist.get_rank() == 0:
        run.path.mkdir()
        run.start(config, ENDPOINTS, 0)
    dist.barrier()
    leave_coordinator_state(run, 1)
    saver = Saver(CheckpointConfig(async_save=False), run, student)
    saver.begin(1)
    weights = exported(student)
    if dist.get_rank() == 0:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, work / "trained.safetensors")
    dist.barrier()
    dist.destroy_process_group()


def start(work: Path, name: str) -> None:
    init_distributed(ConversionConfig(**LAYOUTS[name]).student(work, "float32"), seed=0, timeout_s=100)


def to_megatron(work: Path, name: str, kind: str, target: Path) -> ConversionJob:
    model = work / "models" / kind
    student = ConversionConfig(**LAYOUTS[name]).student(model, weights_dtype(model))
    return ConversionJob(to="megatron", student=student, target=empty(target), events=work / "events.jsonl")


def to_hf(name: str, model: Path, checkpoint: Path, target: Path, shard_bytes: int) -> ConversionJob:
    return ConversionJob(
        to="hf",
        student=ConversionConfig(**LAYOUTS[name]).student(model, "float32"),
        checkpoint=checkpoint,
        saved_tensor_parallel=read_manifest(checkpoint).layout["tensor"],
        target=empty(target),
        shard_bytes=shard_bytes,
        events=target / "events.jsonl",
    )


def empty(folder: Path) -> Path:
    if dist.get_rank() == 0:
        folder.mkdir(parents=True)
    dist.barrier()
    return folder


if __name__ == "__main__":
    main()
