"""Refreshes from a real multimodal student to real engines.

Usage: vision_refresh_worker.py WORK_FOLDER MODEL URL URL_THAT_KEEPS_FEATURES

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
from PIL import Image as Picture

from megatron_opd.config import Config, RefreshConfig, load_config
from megatron_opd.data.images import ImageStore
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import RefreshError
from megatron_opd.records import Image
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.vision import read_vision
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.refresh import WeightRefresh
from megatron_opd.student.step import sequence_logprobs
from megatron_opd.student.transports import Place

SIZES = ((90, 170), (200, 75))  # pixels of two images


async def main() -> None:
    work, model, *urls = sys.argv[1:]
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(place | {"MASTER_PORT": str(free_port())})
    config = config_of(work, model)
    init_distributed(config.student, seed=0)
    tokens, images = make_sample(config)
    found: dict[str, Any] = {}
    async with AsyncExitStack() as stack:
        settings = {"timeout_s": 60, "max_concurrency": 8, "images": ImageFolder(config.images_folder)}
        engines = [WeightClient(url, **settings) for url in urls]
        for engine in engines:
            stack.push_async_callback(engine.close)
        student = build_student(config)
        change(student, 1)
        found["frozen"] = await push(student, engines[:1], "broadcast", 1, work, tokens, images)
        flip(student)
        try:
            await push(student, engines[:1], "broadcast", 2, work, tokens, images)
        except RefreshError as error:
            found["other_tower"] = str(error)
        student = build_student(config_of(work, model, "student.train_vision=true"))
        for version, mode in enumerate(("broadcast", "disk", "tensor"), 3):
            change(student, version)
            found[mode] = await push(student, engines[:1], mode, version, work, tokens, images)
        found["both"] = [await push(student, engines, "broadcast", 6, work, tokens, images)]
        change(student, 7)
        found["both"].append(await push(student, engines, "broadcast", 7, work, tokens, images))
    (Path(work) / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def config_of(work: str, model: str, *changes: str) -> Config:
    changes = (f"student.model={model}", f"data.images.folder={work}/images", "student.tensor_parallel=1", *changes)
    return load_config(Path("conf/toy.yaml"), list(changes))


def make_sample(config: Config) -> tuple[np.ndarray, tuple[Image, ...]]:
    """Text, two images as a run keeps them, each followed by text."""
    vision = read_vision(config.student.model)
    store = ImageStore(config.images_folder, vision, config.data.images)
    generator = np.random.default_rng(5)
    tokens, images = generator.integers(0, 500, 9).tolist(), []
    for number, (height, width) in enumerate(SIZES):
        path = config.images_folder.parent / f"source{number}.png"
        Picture.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)).save(path)
        kept = store.add("image", path)
        images.append(Image(kept.hash, kept.rows, kept.columns, len(tokens) + 1))
        tokens += [vision.start_token, *[vision.image_token] * (kept.rows * kept.columns), vision.end_token]
        tokens += generator.integers(0, 500, 12).tolist()
    return np.array(tokens), tuple(images)


def change(student: Student, seed: int) -> None:
    """Other weights than the engines have, by more than any tolerance, of all that learns."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in student.model[0].parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))


def flip(student: Student) -> None:
    """One bit of the tower: the sign of the largest entry of its first matrix, which the patches come through."""
    (weight,) = [each for name, each in student.model[0].named_parameters() if "patch_embed.proj.weight" in name]
    flat = weight.data.view(-1)
    flat[flat.abs().argmax()] *= -1


async def push(
    student: Student, engines: list[WeightClient], mode: str, version: int, work: str, tokens: np.ndarray, images: tuple
) -> dict[str, Any]:
    """A refresh, and log-probs of the sample by all that are live afterwards."""
    place = Place("127.0.0.1", free_port(), Path(work) / "weights")
    config = RefreshConfig(mode=mode, pause="none", bucket_mb=1)
    refresh = WeightRefresh.connect(config, engines, place, student.bridge.vocab_size, student.images)
    try:
        refreshed = await refresh.push(student, version)
    finally:
        await refresh.close()
    ours = sequence_logprobs(student, tokens, images)
    placeholder = student.images.vision.image_token
    live = [engine for engine in engines if engine.url in refreshed.live]
    theirs = [await engine.sequence_logprobs(tokens, images) for engine in live]
    return {
        "live": list(refreshed.live),
        "out": refreshed.out,
        "bytes": refreshed.bytes,
        "probe": refreshed.probe_difference,
        "sample": [float(np.abs(ours - other)[tokens[1:] != placeholder].max()) for other in theirs],
    }


if __name__ == "__main__":
    asyncio.run(main())
