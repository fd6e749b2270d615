"""A sum over as many ranks as the student has on this machine, with the library that it would use."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, failed, ok, skipped
from megatron_opd.doctor.machine import processors, size
from megatron_opd.engines.command import resolve_device
from megatron_opd.runtime.env import environment
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.train.cluster import find_cluster

NAME = "all-reduce"
ELEMENTS = 1 << 22  # float32
MOST_PER_PROCESSOR = 4
LIMIT_S = 60.0  # of the ranks' meeting and of the sum


def check_all_reduce(config: Config) -> Iterator[Finding]:
    """Start the ranks, sum, compare."""
    nodes = find_cluster(config, environment()).nodes("student")
    ranks = config.student.ranks // nodes
    device = resolve_device(config.student.device)
    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cpu" and ranks > MOST_PER_PROCESSOR * processors():
        yield skipped(NAME, f"{ranks} ranks without a GPU are too many for {processors()} processors")
        return
    import torch

    if device == "cuda" and not torch.backends.cuda.is_built():
        yield skipped(NAME, "this torch is not built for CUDA")
        return
    wrong, seconds = sum_over(ranks, backend)
    here = f"{ranks} rank{'s' if ranks > 1 else ''}" + (
        f" of {config.student.ranks} (this node's)" if nodes > 1 else ""
    )
    if wrong:
        yield failed(NAME, f"{here}, {backend}: {wrong[0]}", "the sum on each rank", _fix(backend))
    else:
        yield ok(NAME, f"{here}, {backend}: {size(4 * ELEMENTS)} in {1000 * seconds:.0f} ms")


def _fix(backend: str) -> str:
    if backend == "nccl":
        return "set NCCL_DEBUG=INFO and look for the first warning; in a container: --ipc=host, and all GPUs visible"
    return "set GLOO_SOCKET_IFNAME=lo; a firewall may block loopback"


def sum_over(ranks: int, backend: str) -> tuple[list[str], float]:
    """What was wrong, and the longest time of one sum, in seconds. When one rank fails, the others are ended."""
    import torch.distributed  # noqa: F401 - once, for all forks; CUDA is first used in them

    context = multiprocessing.get_context("fork")
    answers: SimpleQueue = context.SimpleQueue()
    port = free_port()
    processes = [context.Process(target=_rank, args=(rank, ranks, port, backend, answers)) for rank in range(ranks)]
    for process in processes:
        process.start()
    waiting, seconds = {process.sentinel: process for process in processes}, []
    wrong: list[str] = []
    while waiting and not wrong:
        ended = [waiting.pop(sentinel) for sentinel in wait(list(waiting))]
        wrong += [f"a rank died ({process.exitcode})" for process in ended if process.exitcode]
        while not answers.empty():
            said, took = answers.get()
            wrong += [said] if said else []
            seconds.append(took)
    for process in waiting.values():
        process.kill()
    return wrong, max(seconds, default=0.0)


def _rank(rank: int, ranks: int, port: int, backend: str, answers: SimpleQueue) -> None:
    import torch
    import torch.distributed as dist

    die_with_parent()
    torch.set_num_threads(1)
    wrong, seconds = "", 0.0
    try:
        if backend == "nccl":
            torch.cuda.set_device(rank)
        address, limit = f"tcp://127.0.0.1:{port}", timedelta(seconds=LIMIT_S)
        dist.init_process_group(backend, init_method=address, rank=rank, world_size=ranks, timeout=limit)
        values = torch.full((ELEMENTS,), float(rank + 1), device="cuda" if backend == "nccl" else "cpu")
        dist.all_reduce(torch.ones_like(values))  # the first one also makes the connections
        began = time.monotonic()
        dist.all_reduce(values)
        low, high, expected = float(values.min()), float(values.max()), ranks * (ranks + 1) / 2  # waits for the GPU
        seconds = time.monotonic() - began
        if not low == high == expected:
            wrong = f"got {low:g} to {high:g}, expected {expected:g}"
        dist.destroy_process_group()
    except Exception as error:  # noqa: BLE001 - torch raises anything, and the process ends here in any case
        wrong = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    answers.put((f"rank {rank}: {wrong}" if wrong else "", seconds))
