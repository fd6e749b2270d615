"""One process of a conversion: ``python -m megatron_opd.student convert RANKS PORT JOB``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist

from megatron_opd.errors import CheckpointError
from megatron_opd.observe.recorder import Recorder, tell_failures
from megatron_opd.runtime.conversion import SIDE_FILES, ConversionJob
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.student.build import Model, build_model, init_distributed, load_hf
from megatron_opd.student.checkpoint import layout
from megatron_opd.student.export import copy_side_files, gathered_weights, write_hf
from megatron_opd.student.model_checkpoint import load_model, save_model, saved_dtype


def run(job: ConversionJob) -> None:
    """Be one rank of the conversion. Raises OpdError when the input is not what it should be, or cannot be written."""
    recorder = Recorder(job.events, job.events)
    with tell_failures("convert", recorder):
        init_distributed(job.student, seed=0)
        before = _memory("VmRSS")
        weights = convert(job)
        dist.barrier()
        memory = {"before": before, "weights": weights, "peak": _memory("VmHWM")}
        own = {"rank": dist.get_rank(), "layout": layout(), **memory}
        recorder.event("converted", **own)
        dist.destroy_process_group()


def convert(job: ConversionJob) -> int:
    """The conversion itself, in a process group that exists; bytes of the weights that this rank has."""
    try:
        model = _to_megatron(job) if job.to == "megatron" else _to_hf(job)
    except OSError as error:
        raise CheckpointError("A file cannot be read or written", where=job.target, got=error) from error
    return sum(parameter.nbytes for chunk in model.chunks for parameter in chunk.parameters())


def _to_megatron(job: ConversionJob) -> Model:
    model = build_model(job.student)
    load_hf(model, job.student.model)
    save_model(model, job.target)
    if dist.get_rank() == 0:
        (job.target / SIDE_FILES).mkdir()
        copy_side_files(job.student.model, job.target / SIDE_FILES, model.bridge.dtype)
    return model


def _to_hf(job: ConversionJob) -> Model:
    student = job.student.model_copy(update={"dtype": saved_dtype(job.checkpoint)})
    model = build_model(student)
    load_model(model, job.checkpoint, job.saved_tensor_parallel)
    weights = gathered_weights(model.bridge, model.chunks)
    write_hf(weights, model.bridge.dtype, student.model, job.target, job.shard_bytes)
    return model


def _memory(name: str) -> int:
    """A figure of this process in bytes, as Linux tells it: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


if __name__ == "__main__":
    die_with_parent()
    run(ConversionJob.model_validate_json(sys.argv[1]))
