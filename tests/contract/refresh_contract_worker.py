"""Refreshes from a real student to real engines.

Usage: refresh_contract_worker.py WORK_FOLDER URL_OF_ONE URL_OF_TENSOR_PARALLEL_2

Writes what came out to WORK_FOLDER/found.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_opd.config import RefreshConfig, load_config
from megatron_opd.engines.memory import MemoryOccupation
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import EngineError
from megatron_opd.runtime.ports import free_port
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.refresh import WeightRefresh
from megatron_opd.student.step import sequence_logprobs
from megatron_opd.student.transports import Place

PROMPT = [1, 270, 300, 40, 41, 42, 60, 2, 1, 280]
TOKENS = 600


async def main() -> None:
    work, *urls = sys.argv[1:]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port())})
    config = load_config(Path("conf/toy.yaml"), ["student.tensor_parallel=1"])
    init_distributed(config.student, seed=0)
    student = build_student(config)
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        engines = [WeightClient(url, timeout_s=60, max_concurrency=8) for url in urls]
        for engine in engines:
            stack.push_async_callback(engine.close)
        for version, mode in enumerate(("broadcast", "disk", "tensor"), 1):
            found[mode] = await push_once(student, engines, mode, version, Path(work))
        found["stream"] = await push_once(student, engines, "broadcast", 5, Path(work), again=True)
        for version, pause in enumerate(("retract", "in_place"), 10):
            found[pause] = await in_flight(student, engines[0], pause, version, Path(work))
        found["memory"] = await memory(engines[0])
        found["disk_failed"] = await bad_folder(engines[0], Path(work))
    (Path(work) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def change(student: Student, version: int) -> None:
    """Other weights than the engines have, by more than any tolerance."""
    generator = torch.Generator().manual_seed(version)
    for parameter in student.model[0].parameters():
        parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def connect(engines: list[WeightClient], mode: str, work: Path, pause: str = "none") -> WeightRefresh:
    config = RefreshConfig(mode=mode, pause=pause, bucket_mb=1)
    return WeightRefresh.connect(config, engines, Place("127.0.0.1", free_port(), work / "weights"), 512)


async def push_once(
    student: Student, engines: list[WeightClient], mode: str, version: int, work: Path, *, again: bool = False
) -> dict:
    """``again``: other weights before, over the same connection."""
    change(student, version)
    refresh = connect(engines, mode, work)
    if again:
        await refresh.push(student, version - 1)
        change(student, version - 1)
    refreshed = await refresh.push(student, version)
    streams = again and refresh._transport._group.streams
    await refresh.close()
    return {
        "live": list(refreshed.live),
        "out": refreshed.out,
        "difference": refreshed.probe_difference,
        "bytes": refreshed.bytes,
        "streamed": streams,
        "versions": [await engine.weight_version() for engine in engines],
        "sizes": [await engine.tensor_parallel() for engine in engines],
    }


async def in_flight(student: Student, engine: WeightClient, pause: str, version: int, work: Path) -> dict:
    """A refresh in the middle of a long response: how its log-probs differ from those of the old and new weights."""
    refresh = connect([engine], "broadcast", work, pause)
    await refresh.push(student, version * 10)
    body = {
        "input_ids": PROMPT,
        "sampling_params": {"max_new_tokens": TOKENS, "temperature": 1.0, "ignore_eos": True},
        "return_logprob": True,
    }
    response = asyncio.create_task(engine._post("/generate", body))
    await asyncio.sleep(0.4)
    old = [weights(student)]
    change(student, version)
    await refresh.push(student, version * 10 + 1)
    reply = await response
    spans = reply["meta_info"]["weight_versions"]
    sampled, ids = split_rows(reply["meta_info"]["output_token_logprobs"])
    tokens = np.array([*PROMPT, *ids.tolist()])
    new_values = sequence_logprobs(student, tokens)[len(PROMPT) - 1 :]
    restore(student, old[0])
    old_values = sequence_logprobs(student, tokens)[len(PROMPT) - 1 :]
    await refresh.close()
    start = spans[-1]["start"]
    return {
        "versions": [span["version"] for span in spans],
        "start": start,
        "length": len(ids),
        "retractions": reply["meta_info"].get("num_retractions"),
        "before_is_old": float(np.abs(sampled - old_values)[:start].max()),
        "after_is_new": float(np.abs(sampled - new_values)[start:].max()),
        "after_is_old": float(np.abs(sampled - old_values)[start:].max()),
    }


def weights(student: Student) -> list[torch.Tensor]:
    return [parameter.data.clone() for parameter in student.model[0].parameters()]


def restore(student: Student, kept: list[torch.Tensor]) -> None:
    for parameter, tensor in zip(student.model[0].parameters(), kept, strict=True):
        parameter.data.copy_(tensor)


async def memory(engine: WeightClient) -> list[int]:
    """Released and taken again, each asked for twice; tokens of a response afterwards."""
    state = MemoryOccupation(engine)
    for _ in range(2):
        await state.release(["weights", "kv_cache"])
    await state.resume(["weights"])
    for _ in range(2):
        await state.resume(["weights", "kv_cache"])
    reply = await engine._post("/generate", {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4}})
    return reply["output_ids"]


async def bad_folder(engine: WeightClient, work: Path) -> str:
    """What a folder without files gives; the engine lives on."""
    (work / "empty").mkdir()
    try:
        await engine.load_folder(work / "empty", flush=True, version=99)
    except EngineError as error:
        return f"{error} {await engine.weight_version()}"
    return ""


if __name__ == "__main__":
    asyncio.run(main())
