"""Ways of gloo to give 0.5 GB in 105 tensors from one idle process to another, into memory in use.

    python tools/bench_gloo.py [--repeat 6]

One of 98 MiB, as an embedding, and 104 of 4 MiB; the first row has the same bytes in pieces of 256 MiB. Each figure is
the median of the turns, with the fastest in brackets; ways take turns. Why ``student/transports/sending.py`` sends.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from megatron_opd.runtime.env import child_environment
from megatron_opd.runtime.ports import free_port

MIB = 1 << 20
SIZES = [98 * MIB] + [4 * MIB] * 104


def broadcast_each(tensors: list[torch.Tensor]) -> None:
    for tensor in tensors:
        dist.broadcast(tensor, 0)


def broadcast_all(tensors: list[torch.Tensor]) -> None:
    for work in [dist.broadcast(tensor, 0, async_op=True) for tensor in tensors]:
        work.wait()


def send_all(tensors: list[torch.Tensor]) -> None:
    first = dist.get_rank() == 0
    for work in [dist.isend(tensor, 1) if first else dist.irecv(tensor, 0) for tensor in tensors]:
        work.wait()


def one_of_two(rank: int, port: int, repeat: int) -> None:
    """One of the two processes; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    large = list(torch.ones(sum(SIZES), dtype=torch.uint8).split(256 * MIB))
    tensors = [torch.ones(size, dtype=torch.uint8) for size in SIZES]
    ways = {
        "broadcasts of 256 MiB": (broadcast_each, large),
        "a broadcast for each tensor, one after the other": (broadcast_each, tensors),
        "the same, all begun at once": (broadcast_all, tensors),
        "sends and receives, all begun at once": (send_all, tensors),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeat + 1):
        for name, (way, what) in ways.items():
            dist.barrier()
            began = time.monotonic()
            way(what)
            dist.barrier()
            times[name].append(time.monotonic() - began)
    if rank == 0:
        for name, (_, *values) in times.items():  # the first turn meets and makes buffers
            print(f"{name:50} {statistics.median(values):.3f} s ({min(values):.3f})", flush=True)
    dist.destroy_process_group()


def main() -> int:
    """Run both processes; 1 when one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=6)
    parser.add_argument("--rank", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        one_of_two(*options.rank, options.repeat)
        return 0
    port = str(free_port())
    argv = [sys.executable, __file__, "--repeat", str(options.repeat), "--rank"]
    pair = [subprocess.Popen([*argv, rank, port], env=child_environment(OMP_NUM_THREADS="1")) for rank in "01"]
    return int(any([process.wait() for process in pair]))


if __name__ == "__main__":
    sys.exit(main())
