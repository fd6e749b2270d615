"""Speed of a weight refresh, by each way, against a bare gloo broadcast of the same bytes between two processes.

    python tools/bench_refresh.py [--modes broadcast tensor disk] [--repeat 5] [--layers 11] [--bucket-mb 256]

A random Qwen3 of about 0.5 GB (float32) in a temporary folder, one student rank, one real SGLang on this machine. The
bare broadcast goes between two processes that do nothing else, from and into memory that they have used before: the
best case. Bare and refresh take turns, so that other load meets both; each figure is the median of the turns, with the
fastest in brackets. Seconds of a refresh are those of sending: from the first gathered tensor until the engine has said
that it holds the last one, without the probe.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_opd.config import Config, EngineConfig, RefreshConfig, ServerConfig, parse_config
from megatron_opd.engines.command import server_argv, server_environment
from megatron_opd.engines.weights import WeightClient
from megatron_opd.runtime.env import child_environment
from megatron_opd.runtime.http import wait_until_ready
from megatron_opd.runtime.ports import free_port

SIZES = {"hidden_size": 768, "intermediate_size": 3072, "head_dim": 64, "vocab_size": 32000}


def make_model(folder: Path, layers: int) -> None:
    from transformers import AutoModelForCausalLM, Qwen3Config

    heads = {"num_attention_heads": 12, "num_key_value_heads": 12, "tie_word_embeddings": True}
    config = Qwen3Config(**SIZES, **heads, num_hidden_layers=layers, max_position_embeddings=2048)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)


def bare(rank: int, port: int, size: int, part: int) -> None:
    """One of the two processes: a broadcast of ``size`` bytes in parts for each line that comes in."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    parts = torch.ones(size, dtype=torch.uint8).split(part)
    for _ in sys.stdin:
        dist.barrier()
        began = time.monotonic()
        for tensor in parts:
            dist.broadcast(tensor, 0)
        dist.barrier()
        print(time.monotonic() - began, flush=True)


class BarePair:
    """The two processes."""

    def __init__(self, stack: ExitStack, size: int, part: int) -> None:
        self._pair = []
        port = free_port()
        for rank in (0, 1):
            argv = [sys.executable, __file__, "--bare", str(rank), str(port), str(size), str(part)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            child = subprocess.Popen(argv, text=True, bufsize=1, env=child_environment(OMP_NUM_THREADS="1"), **pipes)
            stack.callback(child.wait)
            stack.callback(child.kill)
            self._pair.append(child)

    def seconds(self) -> float:
        for child in self._pair:
            child.stdin.write("go\n")
        return max(float(child.stdout.readline()) for child in self._pair)


def student_config(model: Path) -> Config:
    plain = {
        "name": "bench",
        "steps": 1,
        "student": {"model": str(model), "device": "cpu"},
        "teachers": {"math": {"model": "none"}},
        "data": {"train": "none.jsonl"},
    }
    return parse_config(plain, where="bench_refresh")


async def measure(options: argparse.Namespace, folder: Path, url: str) -> None:
    from megatron_opd.student.build import build_student, init_distributed
    from megatron_opd.student.export import hf_weights
    from megatron_opd.student.refresh import WeightRefresh
    from megatron_opd.student.transports import Place

    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port())})
    config = student_config(folder / "model")
    init_distributed(config.student, seed=0)
    student = build_student(config)
    await wait_until_ready(f"{url}/ready", 300)
    version, pair = 0, None
    print(f"gathering alone: {1e3 * min(gathering(hf_weights(student)) for _ in range(5)):.1f} ms of CPU time")
    print(f"{'':12}{'s':>16}{'MB/s':>8}{'of bare':>9}   load {os.getloadavg()[0]:.1f}, {os.cpu_count()} cores")
    with ExitStack() as processes:
        for mode in options.modes:
            async with AsyncExitStack() as stack:
                engine = WeightClient(url, timeout_s=300, max_concurrency=4)
                stack.push_async_callback(engine.close)
                settings = RefreshConfig(mode=mode, bucket_mb=options.bucket_mb)
                there = Place("127.0.0.1", free_port(), folder / "weights")
                refresh = WeightRefresh.connect(settings, [engine], there, SIZES["vocab_size"])
                times: dict[str, list[float]] = {"bare": [], mode: []}
                for _ in range(options.repeat + 1):
                    version += 1
                    found = await refresh.push(student, version)
                    pair = pair or BarePair(processes, found.bytes, settings.bucket_bytes)
                    times["bare"].append(pair.seconds())
                    times[mode].append(found.seconds)
                for name, values in times.items():
                    tell(name, values[1:], times["bare"][1:], found.bytes)  # the first meets and makes buffers
                await refresh.close()
    dist.destroy_process_group()


def gathering(weights: Iterator[tuple[str, torch.Tensor]]) -> float:
    """CPU seconds."""
    began = time.process_time()
    for _ in weights:
        pass
    return time.process_time() - began


def tell(name: str, seconds: list[float], bare_seconds: list[float], size: int) -> None:
    middle, best = statistics.median(seconds), min(seconds)
    share = statistics.median(other / own for own, other in zip(seconds, bare_seconds, strict=True))
    print(f"{name:12}{middle:8.3f} ({best:.3f}){size / middle / 1e6:8.0f}{share:9.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", nargs="+", default=["broadcast", "tensor", "disk"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--layers", type=int, default=11)
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--bare", nargs=4, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        bare(*options.bare)
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, url = Path(name), f"http://127.0.0.1:{free_port()}"
        make_model(folder / "model", options.layers)
        engine, server = EngineConfig(device="cpu"), ServerConfig()
        argv = server_argv(engine, server, folder / "model", url, seed=0)
        log = stack.enter_context((folder / "engine.log").open("w"))
        child = subprocess.Popen(argv, env=server_environment(engine, server), stdout=log, stderr=log)
        stack.callback(child.wait)
        stack.callback(child.kill)
        asyncio.run(measure(options, folder, url))


if __name__ == "__main__":
    main()
