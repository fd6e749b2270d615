"""Memory and time of log-probs and their gradients: from hidden states in blocks, against the plain formula on logits.

    python tools/bench_logprob.py [--tokens 4096] [--vocab 151936] [--hidden 1024] [--dtype float32] [--used 1.0]

Ways: ``plain`` is log_softmax((hidden @ weight.T).float()) and gather, under autograd; ``loss`` and ``logprobs`` are
the two operations of student/fused_logprob.py: a loss of the log-probs, as the student trains, and log-probs for a loss
outside. The loss is half the sum of the squared log-probs. Each way runs forward and backward in a process of its own;
the ways take turns, ``--repeat`` times. Extra memory: highest resident size while it runs, less that before, less the
gradients of hidden states and weight; the largest of all runs. Seconds: CPU time of forward and backward, the median.
Ratios are to ``plain``, which needs about 8 GB at the default sizes. The norms of the gradients must agree.
``--used``: share of positions whose log-prob has a gradient; in training, those of prompts and masked tokens have none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_opd.student.fused_logprob import hidden_logprobs, hidden_loss

WAYS = ("plain", "loss", "logprobs")


def run(way: str, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, used: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass; leaves gradients."""

    def loss(logprobs: torch.Tensor, at: slice) -> torch.Tensor:
        return (logprobs.square() * used[at, None]).sum() / 2

    hidden.grad = weight.grad = None
    began = time.process_time()
    if way == "loss":
        total, _ = hidden_loss(hidden, weight, ids, loss, len(weight), dist.group.WORLD)
    else:
        if way == "plain":
            logprobs = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, ids)
        else:
            logprobs, _ = hidden_logprobs(hidden, weight, ids, len(weight), dist.group.WORLD)
        total = loss(logprobs, slice(None))
    total.backward()
    return time.process_time() - began


def resident(name: str) -> int:
    """A field of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def measure(options: argparse.Namespace) -> dict[str, float]:
    """What one way takes, in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        dtype = getattr(torch, options.dtype)
        hidden = torch.randn(options.tokens, options.hidden).to(dtype).requires_grad_()
        weight = torch.randn(options.vocab, options.hidden, dtype=dtype).mul_(options.hidden**-0.5).requires_grad_()
        ids = torch.randint(0, options.vocab, (options.tokens, options.ids))
        used = torch.rand(options.tokens) < options.used
        small = [hidden[:8].detach().requires_grad_(), weight[:64].detach().requires_grad_(), ids[:8] % 64, used[:8]]
        run(options.way, *small)  # loads the kernels

        Path("/proc/self/clear_refs").write_text("5")  # forget the highest size so far
        before = resident("VmRSS")
        seconds = run(options.way, hidden, weight, ids, used)
        extra = resident("VmHWM") - before - sum(tensor.grad.nbytes for tensor in (hidden, weight))
        norms = [tensor.grad.double().norm().item() for tensor in (hidden, weight)]
        dist.destroy_process_group()
    return {"extra": extra, "seconds": seconds, "by_hidden": norms[0], "by_weight": norms[1]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ids", type=int, default=1, help="ids of each position")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--used", type=float, default=1.0, help="share of positions with a gradient")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="this one only, in this process, as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    needed, free = 16 * options.tokens * options.vocab, psutil.virtual_memory().available
    if free < needed:
        parser.error(f"the plain formula may need {needed >> 20:,} MiB, only {free >> 20:,} MiB are free")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(options.repeat):
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", *sys.argv, "--way", way]
            found[way].append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
            print(f"{turn + 1}: {way:8} {found[way][-1]['seconds']:8.2f} s", flush=True)
    report(found, tolerance=1e-2 if options.dtype == "bfloat16" else 1e-5)


def report(found: dict[str, list[dict[str, float]]], tolerance: float) -> None:
    """Print what each way takes, and that of ``plain``."""
    extra = {way: max(run["extra"] for run in runs) for way, runs in found.items()}
    seconds = {way: statistics.median(run["seconds"] for run in runs) for way, runs in found.items()}
    for way, runs in found.items():
        for norm in ("by_hidden", "by_weight"):
            assert math.isclose(runs[0][norm], found["plain"][0][norm], rel_tol=tolerance), found
        print(
            f"{way:8} extra {extra[way] / 2**20:8.1f} MiB = {extra[way] / extra['plain']:7.2%}"
            f"   {seconds[way]:8.2f} s = {seconds[way] / seconds['plain']:.2f}x"
        )


if __name__ == "__main__":
    main()
