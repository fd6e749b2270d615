"""A sum over as many ranks as the student has, where it would have them, with the library that it would use.

On each node of a SLURM job this is started as ``python -m megatron_opd.doctor.collective MEETING RANKS NODES BACKEND``.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.queues import SimpleQueue

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, failed, ok, skipped
from megatron_opd.doctor.machine import processors, size
from megatron_opd.doctor.on_nodes import ask_nodes, known_cluster, tell
from megatron_opd.engines.command import resolve_device
from megatron_opd.runtime.env import node_rank
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.train.cluster import Cluster

NAME = "all-reduce"
ELEMENTS = 1 << 22  # float32
MOST_PER_PROCESSOR = 4
LIMIT_S = 60.0  # of the ranks' meeting and of the sum
NODES_LIMIT_S = 170.0  # with srun, and torch's import from a file system that all nodes share


def check_all_reduce(config: Config) -> Iterator[Finding]:
    """Start the ranks, sum, compare."""
    cluster, ranks = known_cluster(config), config.student.ranks
    if cluster is None:
        yield skipped(NAME, "the roles do not fit: see placement")
        return
    backend, room = _where(config, cluster)
    if backend == "gloo" and ranks > MOST_PER_PROCESSOR * room:
        yield skipped(NAME, f"{ranks} ranks without a GPU are too many for {room} processors")
        return
    if backend == "nccl" and cluster.allocation is None and not _built_for_cuda():
        yield skipped(NAME, "this torch is not built for CUDA")
        return
    if cluster.allocation is None:
        wrong, seconds = sum_over(f"127.0.0.1:{free_port()}", ranks, 1, backend)
    else:
        wrong, seconds = _on_nodes(cluster, ranks, backend)
    nodes = cluster.nodes("student")
    ran = f"{ranks} rank{'s' if ranks > 1 else ''}{f' on {nodes} nodes' if nodes > 1 else ''}, {backend}"
    if wrong:
        yield failed(NAME, f"{ran}: {wrong[0]}", "the sum on each rank", _fix(backend))
    else:
        yield ok(NAME, f"{ran}: {size(4 * ELEMENTS)} in {1000 * seconds:.0f} ms")


def _where(config: Config, cluster: Cluster) -> tuple[str, int]:
    """The library, and how many processors the ranks have together."""
    if cluster.allocation is None:
        return "nccl" if resolve_device(config.student.device) == "cuda" else "gloo", processors()
    place = cluster.places["student"]
    on_gpus = bool(place.gpus) and config.student.device != "cpu"
    return "nccl" if on_gpus else "gloo", sum(node.cpus for node in place.nodes)


def _on_nodes(cluster: Cluster, ranks: int, backend: str) -> tuple[list[str], float]:
    """As ``sum_over``, over all nodes of the student."""
    arguments = [f"{cluster.host('student')}:{free_port()}", str(ranks), str(cluster.nodes("student")), backend]
    told = ask_nodes(cluster, "student", "megatron_opd.doctor.collective", arguments, NODES_LIMIT_S)
    return [said for wrong, _ in told for said in wrong], max(seconds for _, seconds in told)


def _built_for_cuda() -> bool:
    import torch

    return torch.backends.cuda.is_built()


def _fix(backend: str) -> str:
    if backend == "nccl":
        return "set NCCL_DEBUG=INFO and look for the first warning; in a container: --ipc=host, and all GPUs visible"
    return "set GLOO_SOCKET_IFNAME to the network's interface (lo on one machine); a firewall may block it"


def sum_over(meeting: str, ranks: int, nodes: int, backend: str) -> tuple[list[str], float]:
    """Start this node's share of ``ranks``, which meet at ``meeting`` (HOST:PORT, on the first node).

    What was wrong here, and the longest time of one sum, in seconds. When one rank fails, the others are ended.
    """
    import torch.distributed  # noqa: F401 - once, for all forks; CUDA is first used in them

    context = multiprocessing.get_context("fork")
    answers: SimpleQueue = context.SimpleQueue()
    share = ranks // nodes
    group = (f"tcp://{meeting}", ranks, share * (node_rank() if nodes > 1 else 0), backend)
    processes = [context.Process(target=_rank, args=(local, *group, answers)) for local in range(share)]
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


def _rank(local: int, meeting: str, ranks: int, first: int, backend: str, answers: SimpleQueue) -> None:
    """One rank; ``first`` is the number of this node's first among all."""
    import torch
    import torch.distributed as dist

    die_with_parent()
    torch.set_num_threads(1)
    rank, wrong, seconds = first + local, "", 0.0
    try:
        if backend == "nccl":
            torch.cuda.set_device(local)
        limit = timedelta(seconds=LIMIT_S)
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=ranks, timeout=limit)
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


if __name__ == "__main__":
    tell(sum_over(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
