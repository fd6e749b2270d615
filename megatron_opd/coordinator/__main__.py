"""The coordinator's process: ``python -m megatron_opd.coordinator RUN_DIRECTORY``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Coroutine, Hashable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from aiohttp import web

from megatron_opd.config import Config
from megatron_opd.coordinator.app import BatchBoard, make_app
from megatron_opd.coordinator.engines import holds, keep_supplied
from megatron_opd.coordinator.evaluate import first_of_each_domain
from megatron_opd.coordinator.loop import Loop
from megatron_opd.coordinator.stages import Stages
from megatron_opd.coordinator.state import Progress, read
from megatron_opd.coordinator.summary import summary
from megatron_opd.coordinator.watchdog import watch
from megatron_opd.data.inputs import open_stream, read_held_out
from megatron_opd.data.tokenizer import lacking_tokens, load_tokenizer
from megatron_opd.engines.connect import new_pool
from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.observe.activity import Activity
from megatron_opd.observe.prometheus import Exposition
from megatron_opd.observe.recorder import Recorder
from megatron_opd.observe.role import run_role
from megatron_opd.observe.sinks import open_sinks
from megatron_opd.runtime.checkpoints import COORDINATOR
from megatron_opd.runtime.env import token
from megatron_opd.runtime.replicas import ReplicaPool
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.runtime.vision import text_config
from megatron_opd.teachers.pool import TeacherPool
from megatron_opd.teachers.start import start_teachers
from megatron_opd.verifiers.pool import VerifierPool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("megatron_opd.coordinator")  # not __name__, which is __main__ here


async def coordinate(run: RunDirectory) -> None:
    """Serve and drive one run, then write its summary."""
    began, config, endpoints, start = time.time(), run.config(), run.endpoints(), run.start_step()
    recorder, board = Recorder(run.events, run.metrics), BatchBoard(start)
    activity, exposition = Activity(run.activity), Exposition()
    recorder.listen(exposition)
    tokenizer = load_tokenizer(config.student.model)
    tokenizer.save_pretrained(str(run.tokenizer))
    (stream, prompts), held_out = open_stream(config, tokenizer), read_held_out(config, tokenizer)
    logger.info("%s of %s, %d held-out prompts", type(stream).__name__, config.data.train, len(held_out))
    progress = Progress()
    if start:
        progress, state = read(run.checkpoints.folder(start) / COORDINATOR, prompts)
        stream.restore(state)
    async with AsyncExitStack() as stack:
        stack.enter_context(open_sinks(config, run, recorder))
        await _serve(stack, make_app(board, token(), exposition), endpoints.coordinator)
        attempts, top_k, seed = config.scoring.attempts, config.scoring.top_k, config.sampling_seed
        probe = partial(holds, board=board)
        server, images = config.rollout.server, ImageFolder(config.images_folder)
        servers = new_pool(stack, "rollout", config.engine, server, endpoints.rollout, probe, images)
        await asyncio.gather(*(client.wait_until_ready(config.engine.start_timeout_s) for client in servers.clients))
        lacking = partial(lacking_tokens, config.student.model)
        teachers = await start_teachers(stack, config, endpoints.teachers, endpoints.reference, lacking)
        logger.info("all servers answer: %s", endpoints)
        await _check_deterministic(servers, *teachers.pools, config=config)
        info = await servers.clients[0].server_info()
        engine = RolloutEngine(servers, tokenizer, attempts, top_k, seed, refreshed=True)
        verifiers = VerifierPool(config.verifiers)
        stack.push_async_callback(verifiers.close)
        loop = Loop(
            config=config,
            stages=Stages(engine, verifiers, teachers, config.rollout, config.balance, config.seed, activity.advance),
            student_sampler=RolloutEngine(servers, tokenizer, attempts, seed=seed, refreshed=True),
            teacher_samplers=_teacher_samplers(teachers, tokenizer, attempts, seed),
            attention_length=12.0 * _model_fact(config.student.model, "hidden_size"),
            stream=stream,
            held_out=first_of_each_domain(held_out, config.evaluation.limit),
            board=board,
            recorder=recorder,
            activity=activity,
            run_directory=run,
            prompts=prompts,
            progress=progress,
            began=began,
        )
        finished = await _first(
            _to_the_end(loop, board, config.world_size),
            keep_supplied(servers, board, recorder),
            _watch(config.coordinator.watchdog_s, [servers, *teachers.pools], verifiers, board, recorder),
        )
        if not finished:
            return
        result = summary(config, loop.now(), board.reports, info)
        run.summary.write_text(json.dumps(result, indent=2) + "\n")
        recorder.event("finished")


def _teacher_samplers(
    teachers: TeacherPool, tokenizer: PreTrainedTokenizerBase, attempts: int, seed: int | None
) -> dict[str, RolloutEngine]:
    """What asks each teacher the held-out prompts, by domain."""
    return {
        domain: RolloutEngine(
            teacher.replicas, tokenizer, attempts, seed=seed, leave_out_images=teacher.leaves_out_images
        )
        for domain, teacher in teachers.teachers.items()
    }


async def _to_the_end(loop: Loop, board: BatchBoard, ranks: int) -> bool:
    """False when the run pauses."""
    finished = await loop.run()
    await board.end(ranks)
    return finished


async def _first(*works: Coroutine[None, None, object]) -> object:
    """Do all at once until one of them is done, and return its result, or raise what went wrong."""
    tasks = [asyncio.create_task(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task.result() for task in done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _watch(
    limit_s: float, pools: Sequence[ReplicaPool], verifiers: VerifierPool, board: BatchBoard, recorder: Recorder
) -> None:
    def moved() -> Hashable:
        return board.moved, verifiers.under_way, *(pool.answered for pool in pools)

    def waits() -> list[str]:
        judged = [f"{verifiers.under_way} responses wait for a verifier"] if verifiers.under_way else []
        return [*(line for pool in pools for line in pool.waits()), *judged, *board.waits()]

    await watch(limit_s, moved, waits, recorder)


async def _serve(stack: AsyncExitStack, app: web.Application, url: str) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    address = urlsplit(url)
    await web.TCPSite(runner, address.hostname, address.port, shutdown_timeout=2).start()


async def _check_deterministic(*pools: ReplicaPool, config: Config) -> None:
    """An attached server may have been started otherwise; without seeds its responses to one prompt would be equal."""
    wanted = config.engine.deterministic
    for server in [client for pool in pools for client in pool.clients if isinstance(client, SGLangClient)]:
        found = await server.is_deterministic()
        if found != wanted:
            raise EngineError(
                "The server was not started as engine.deterministic says",
                where=server.url,
                got=f"deterministic mode {'on' if found else 'off'}",
                expected="on" if wanted else "off",
                fix="start the server with or without --enable-deterministic-inference, or change engine.deterministic",
            )


def _model_fact(model: Path, name: str) -> int:
    return text_config(json.loads((model / "config.json").read_text()))[name]


if __name__ == "__main__":
    run_role("coordinator", coordinate)
