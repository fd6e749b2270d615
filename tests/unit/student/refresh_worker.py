"""Refreshes from the ranks of a real student to engines that only keep what they are sent.

Usage: refresh_worker.py WORK_FOLDER layouts|faults JSON
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist
from fake_engine import FakeEngine, ForkedEngine
from forked import run_layouts
from student_case import kinds_of, make_config

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import OpdError
from megatron_opd.runtime.http import TransientError, wait_until_ready
from megatron_opd.runtime.ports import free_port
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.refresh import WeightRefresh
from megatron_opd.student.transports import Place, base, broadcast

BUCKET = 40_000  # bytes: several for each of these models
RECEIVE = "/update_weights_from_distributed"
TOLERANCE = 50.0  # of the fake's log-probs: -1 passes, -100 does not

RefreshConfig.bucket_bytes = property(lambda config: BUCKET)
base.ANSWER_S = broadcast.PARTING_S = 1.0


def main() -> None:
    work, kind, cases = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    if kind == "layouts":
        ranks = {name: make_config(work, **sizes).world_size for name, (sizes, _) in cases.items()}
        run_layouts(ranks, lambda name: run_layout(work, name, *cases[name]), work)
    else:
        run_layouts({"faults": 1}, lambda _: run_faults(work, cases), work)


def run_layout(work: Path, name: str, sizes: dict[str, Any], mode: str) -> None:
    """Two refreshes, the second after the weights have changed; what arrived is compared by the test."""
    kind = kinds_of(name)[0]
    folder = work / name
    folder.mkdir(exist_ok=True)
    forked = ForkedEngine(FakeEngine(folder, streams=True)) if os.environ["RANK"] == "0" else None
    config = make_config(work / kind, **sizes)
    init_distributed(config.student, seed=0, timeout_s=200)
    student = build_student(config)
    asyncio.run(send_twice(student, folder, forked, mode))
    dist.barrier()
    dist.destroy_process_group()


async def send_twice(student: Student, folder: Path, forked: ForkedEngine | None, mode: str) -> None:
    async with AsyncExitStack() as stack:
        engines = []
        if forked:
            stack.callback(forked.kill)
            engines = [await started(stack, forked, free_port())]
        refresh = connect(engines, mode, folder)
        await refresh.push(student, 3)
        first = (await calls_of(engines[0])).count(RECEIVE) if forked else 0
        for chunk in student.model:
            for parameter in chunk.parameters():
                parameter.data.mul_(2.0)
        found = await refresh.push(student, 4)
        if forked:
            await engines[0]._post("/save", {})
            version = await engines[0].weight_version()
            requests = [first, (await calls_of(engines[0])).count(RECEIVE) - first]
            (folder / "found.json").write_text(json.dumps([version, found.bytes, list(found.live), requests]))
        await refresh.close()


def connect(engines: list[WeightClient], mode: str, folder: Path, **options: Any) -> WeightRefresh:
    colocated = options.pop("colocated", False)
    config = RefreshConfig(mode=mode, probe_tolerance=TOLERANCE, **options)
    place = Place("127.0.0.1", free_port(), folder / "weights")
    return WeightRefresh.connect(config, engines, place, 515, colocated=colocated)


async def started(stack: AsyncExitStack, forked: ForkedEngine, port: int) -> WeightClient:
    forked.start(port)
    url = f"http://127.0.0.1:{port}"
    await wait_until_ready(f"{url}/ready", 30)
    client = WeightClient(url, timeout_s=20, max_concurrency=4)
    stack.push_async_callback(client.close)
    return client


def run_faults(work: Path, cases: dict[str, dict[str, Any]]) -> None:
    """Each case: engines with their faults, the way, and what is started again on the first one's port."""
    forked = {}
    for name, case in cases.items():
        for number, fault in enumerate([*case["engines"], {}]):  # the last one takes the place of one that died
            folder = work / f"{name}-{number}"
            folder.mkdir()
            forked[name, number] = ForkedEngine(FakeEngine(folder, **fault))
    config = make_config(work / "tied")
    init_distributed(config.student, seed=0, timeout_s=200)
    student = build_student(config)
    found = {}
    try:
        for name, case in cases.items():
            mine = [forked[name, number] for number in range(len(case["engines"]) + 1)]
            found[name] = asyncio.run(run_fault(work, student, mine, **case))
    finally:
        for engine in forked.values():
            engine.kill()
    (work / "faults.pickle").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


async def run_fault(
    work: Path,
    student: Student,
    forked: list[ForkedEngine],
    engines: list[dict],
    mode: str,
    back_after_s: float = -1.0,
    replaced: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Two refreshes; between them, or ``back_after_s`` into the first, the spare engine takes the first one's port,
    unless nothing is ``replaced``."""
    async with AsyncExitStack() as stack:
        ports = [free_port() for _ in engines]
        clients = [await started(stack, *pair) for pair in zip(forked, ports, strict=False)]
        refresh = connect(clients, mode, work, timeout_s=4, **options)
        result: dict[str, Any] = {"urls": [client.url for client in clients]}

        async def replace_first() -> None:
            await asyncio.sleep(max(0.0, back_after_s))
            forked[0].kill()
            forked[-1].start(ports[0])

        if back_after_s >= 0:
            replacing = asyncio.create_task(replace_first())
        try:
            result["first"] = await refresh.push(student, 1)
            for client in clients:
                if client.url in result["first"].live:
                    await client._post("/save", {})
            await refresh.borrow_memory(student)
            result["calls"] = [await calls_of(client) for client in clients]
            if not replaced:
                pass
            elif back_after_s < 0:
                await replace_first()
                await wait_until_ready(f"{clients[0].url}/ready", 30)
            else:
                await replacing
            result["second"] = await refresh.push(student, 2)
            result["later_calls"] = [await calls_of(client) for client in clients]
        except OpdError as error:
            result["error"] = f"{type(error).__name__}: {error}"
        return result


async def calls_of(client: WeightClient) -> list[str] | None:
    """Paths that an engine was asked for, in order; None when it does not say."""
    try:
        return await base.soon(client, client._get("/calls"))
    except TransientError:
        return None


if __name__ == "__main__":
    main()
