"""Refreshes from the ranks of a multimodal student to an engine that only keeps what it is sent.

Usage: vision_push_worker.py WORK_FOLDER
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import torch.distributed as dist
from fake_engine import FakeEngine, ForkedEngine
from forked import run_layouts
from refresh_worker import TOLERANCE
from vision_push_case import CASES
from vision_worker import config_of

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.weights import WeightClient
from megatron_opd.runtime.http import wait_until_ready
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.vision import read_vision
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.refresh import WeightRefresh
from megatron_opd.student.transports import Place


def main() -> None:
    work = Path(sys.argv[1])
    ranks = {name: config_of(work, sizes, train_vision=False).world_size for name, (_, sizes, _, _) in CASES.items()}
    run_layouts(ranks, lambda name: run_case(work, name), work)


def run_case(work: Path, name: str) -> None:
    family, sizes, learning, mode = CASES[name]
    folder, model = work / name, work / family
    folder.mkdir(exist_ok=True)
    engine = FakeEngine(folder, image_side=read_vision(model).token_pixels)
    forked = ForkedEngine(engine) if os.environ["RANK"] == "0" else None
    config = config_of(model, sizes, train_vision=learning)
    init_distributed(config.student, seed=0, timeout_s=200)
    student = build_student(config)
    asyncio.run(send_twice(student, folder, forked, mode, config.images_folder))
    dist.barrier()
    dist.destroy_process_group()


async def send_twice(student: Student, folder: Path, forked: ForkedEngine | None, mode: str, images: Path) -> None:
    """The second time after all that learns has changed."""
    async with AsyncExitStack() as stack:
        engines = []
        if forked:
            stack.callback(forked.kill)
            port = free_port()
            forked.start(port)
            await wait_until_ready(f"http://127.0.0.1:{port}/ready", 30)
            settings = {"timeout_s": 20, "max_concurrency": 4, "images": ImageFolder(images)}
            engines = [WeightClient(f"http://127.0.0.1:{port}", **settings)]
            stack.push_async_callback(engines[0].close)
        settings = RefreshConfig(mode=mode, probe_tolerance=TOLERANCE)
        place = Place("127.0.0.1", free_port(), folder / "weights")
        refresh = WeightRefresh.connect(settings, engines, place, student.bridge.vocab_size, student.images)
        await refresh.push(student, 1)
        for chunk in student.model:
            for parameter in chunk.parameters():
                parameter.data.mul_(2.0 if parameter.requires_grad else 1.0)
        found = await refresh.push(student, 2)
        if forked:
            await engines[0]._post("/save", {})
            (folder / "found.json").write_text(json.dumps([found.bytes, list(found.live), found.probe_difference]))
        await refresh.close()


if __name__ == "__main__":
    main()
