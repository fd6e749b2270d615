"""Running the processes of one conversion, none of which is left behind."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.errors import CheckpointError, OpdError
from megatron_opd.observe.recorder import read_events
from megatron_opd.runtime.conversion import ConversionJob
from megatron_opd.runtime.env import child_environment
from megatron_opd.runtime.process import Child, adopt_orphans, start, stop
from megatron_opd.runtime.supervision import POLL_S, death, ignore_signals
from megatron_opd.train.roles import ranks_argv

ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "",  # so that the ranks take the same way as on a machine without a GPU
    "MALLOC_MMAP_THRESHOLD_": str(2**20),  # so that glibc gives the memory of a tensor back at once
}


@dataclass(frozen=True)
class RankMemory:
    """Resident bytes of one process, mapped files included."""

    rank: int
    before: int  # with torch and Megatron loaded, and no model
    weights: int  # of its part of the model
    peak: int


@dataclass(frozen=True)
class Converted:
    """How a conversion went."""

    bytes: int  # of all files that were written
    seconds: float
    ranks: list[RankMemory]
    layout: dict[str, int]  # parallel sizes


def run_ranks(job: ConversionJob, log: Path) -> Converted:
    """Start the processes and wait until all are done. However it ends, none is left.

    Raises CheckpointError with what a process told, ProcessError with the end of the log when it could tell nothing.
    """
    began, threads = time.monotonic(), str(job.student.threads_per_rank)
    job.events.touch()
    adopt_orphans()
    argv, child = ranks_argv("convert", job.student.ranks, job.model_dump_json()), None
    try:
        child = start("the conversion", argv, child_environment(OMP_NUM_THREADS=threads, **ENVIRONMENT), log)
        while child.returncode is None:
            time.sleep(POLL_S)
    finally:
        ignore_signals()  # the clean-up is not interrupted
        if child is not None:
            stop(child)
    events = read_events(job.events)
    if child.returncode != 0:
        raise _failure(child, events)
    done = [event for event in events if event["event"] == "converted"]
    ranks = [RankMemory(event["rank"], event["before"], event["weights"], event["peak"]) for event in done]
    size = sum(path.stat().st_size for path in job.target.rglob("*") if path.is_file())
    seconds = time.monotonic() - began
    return Converted(size, seconds, sorted(ranks, key=lambda rank: rank.rank), done[0]["layout"])


def _failure(child: Child, events: list[dict]) -> OpdError:
    told = [event["error"] for event in events if event["event"] == "failed"]
    return CheckpointError(told[0]) if told else death(child)
