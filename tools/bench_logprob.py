"""Memory and time of log-probs and their gradients: from hidden states in blocks, against the plain formula on logits.

    python tools/bench_logprob.py [--tokens 4096] [--vocab 151936] [--hidden 1024] [--dtype float32] [--used 1.0]

Ways: ``plain`` is log_softmax((hidden @ weight.T).float()) and gather, under autograd; ``logits`` makes the logits and
hands them to student/logprob.py; ``fused`` is student/fused_logprob.py. Each runs forward and backward in a process of
its own. Extra memory: highest resident size while it runs, less that before, less the gradients of hidden states and
weight. Seconds: CPU time of forward and backward, best of ``--repeat``. Ratios are to ``plain``, which needs about 8 GB
at the default sizes. The norms of the gradients must agree. ``--used``: share of positions whose log-prob has a
gradient; in training, those of prompts and masked tokens have none.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from megatron_opd.student.fused_logprob import hidden_logprobs
from megatron_opd.student.logprob import vocab_parallel_logprobs

WAYS = ("plain", "logits", "fused")


def logprobs(way: str, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    if way == "plain":
        return torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, ids)
    if way == "logits":
        return vocab_parallel_logprobs(hidden @ weight.T, ids, len(weight), dist.group.WORLD)
    return hidden_logprobs(hidden, weight, ids, len(weight), dist.group.WORLD)[0]


def run(way: str, hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, used: torch.Tensor) -> float:
    """CPU seconds of one forward and backward pass; leaves gradients."""
    hidden.grad = weight.grad = None
    began = time.process_time()
    found = logprobs(way, hidden, weight, ids)
    found.backward(found.detach() * used[:, None])
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
        for _ in range(options.repeat - 1):
            seconds = min(seconds, run(options.way, hidden, weight, ids, used))
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
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--way", choices=WAYS, help="this one only, in this process, as JSON")
    options = parser.parse_args()
    if options.way:
        print(json.dumps(measure(options)))
        return
    needed, free = 16 * options.tokens * options.vocab, psutil.virtual_memory().available
    if free < needed:
        parser.error(f"the plain formula may need {needed >> 20:,} MiB, only {free >> 20:,} MiB are free")
    found: dict[str, dict[str, float]] = {}
    for way in WAYS:
        command = [sys.executable, "-W", "ignore", *sys.argv, "--way", way]
        found[way] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        now, plain = found[way], found["plain"]
        for norm in ("by_hidden", "by_weight"):
            assert math.isclose(now[norm], plain[norm], rel_tol=1e-2 if options.dtype == "bfloat16" else 1e-5), found
        print(
            f"{way:7} extra {now['extra'] / 2**20:8.1f} MiB = {now['extra'] / plain['extra']:7.2%}"
            f"   {now['seconds']:8.2f} s = {now['seconds'] / plain['seconds']:.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
