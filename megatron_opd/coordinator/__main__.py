"""The coordinator's process: ``python -m megatron_opd.coordinator RUN_DIRECTORY``."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from contextlib import AsyncExitStack
from pathlib import Path
from urllib.parse import urlsplit

from aiohttp import web

from megatron_opd.config import Config
from megatron_opd.coordinator.app import BatchBoard, make_app
from megatron_opd.coordinator.evaluate import first_of_each_domain
from megatron_opd.coordinator.loop import Loop
from megatron_opd.coordinator.stages import Stages
from megatron_opd.coordinator.state import Progress, fingerprint, read
from megatron_opd.coordinator.summary import summary
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.data.stream import LazyStream, PromptStream
from megatron_opd.data.tokenizer import load_tokenizer
from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.observe.recorder import Recorder
from megatron_opd.observe.role import run_role
from megatron_opd.records import Prompt
from megatron_opd.runtime.checkpoints import COORDINATOR
from megatron_opd.runtime.env import token
from megatron_opd.runtime.http import wait_until_ready
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.verifiers.pool import VerifierPool

logger = logging.getLogger("megatron_opd.coordinator")  # not __name__, which is __main__ here


async def coordinate(run: RunDirectory) -> None:
    """Serve and drive one run, then write its summary."""
    began, config, endpoints, start = time.time(), run.config(), run.endpoints(), run.start_step()
    recorder, board = Recorder(run.events, run.metrics), BatchBoard(start)
    tokenizer = load_tokenizer(config.student.model)
    tokenizer.save_pretrained(str(run.tokenizer))
    train, held_out = read_inputs(config, tokenizer)
    logger.info("%d training prompts, %d held-out prompts", len(train), len(held_out))
    stream, prompts, progress = _stream(config, train), fingerprint(train), Progress()
    if start:
        progress, state = read(run.checkpoints.folder(start) / COORDINATOR, prompts)
        stream.restore(state)
    async with AsyncExitStack() as stack:
        await _serve(stack, board, endpoints.coordinator)
        attempts, top_k = config.scoring.attempts, config.scoring.top_k
        client = await _client(stack, endpoints.rollout, config)
        seed = config.sampling_seed
        engine = RolloutEngine(client, tokenizer, attempts, top_k, seed)
        clients = {domain: await _client(stack, url, config) for domain, url in endpoints.teachers.items()}
        reference = await _client(stack, endpoints.reference, config) if endpoints.reference else None
        verifiers = VerifierPool(config.verifiers)
        stack.push_async_callback(verifiers.close)
        loop = Loop(
            config=config,
            stages=Stages(
                engine, verifiers, _teachers(config, clients, reference), config.rollout, config.balance, config.seed
            ),
            student_sampler=RolloutEngine(client, tokenizer, attempts, seed=seed),
            teacher_samplers={
                domain: RolloutEngine(teacher, tokenizer, attempts, seed=seed) for domain, teacher in clients.items()
            },
            attention_length=12.0 * _model_fact(config.student.model, "hidden_size"),
            stream=stream,
            held_out=first_of_each_domain(held_out, config.evaluation.limit),
            board=board,
            recorder=recorder,
            run_directory=run,
            prompts=prompts,
            progress=progress,
            began=began,
        )
        servers = [endpoints.rollout, *endpoints.teachers.values(), *filter(None, [endpoints.reference])]
        await _servers_ready(servers, config.engine.start_timeout_s)
        logger.info("all servers answer: %s", endpoints)
        for server in [client, *clients.values(), *filter(None, [reference])]:
            await _check_deterministic(server, config)
        await loop.run()
        info = await engine.client.server_info()
        result = summary(config, loop.now(), board.reports, info)
        run.summary.write_text(json.dumps(result, indent=2) + "\n")
        recorder.event("finished")


async def _serve(stack: AsyncExitStack, board: BatchBoard, url: str) -> None:
    runner = web.AppRunner(make_app(board, token()), access_log=None)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    address = urlsplit(url)
    await web.TCPSite(runner, address.hostname, address.port, shutdown_timeout=2).start()


async def _servers_ready(urls: list[str], timeout_s: float) -> None:
    await asyncio.gather(*(wait_until_ready(f"{url}/ready", timeout_s) for url in urls))


async def _client(stack: AsyncExitStack, url: str, config: Config) -> SGLangClient:
    client = SGLangClient(url, timeout_s=config.engine.request_timeout_s, max_concurrency=config.engine.max_concurrency)
    stack.push_async_callback(client.close)
    return client


async def _check_deterministic(server: SGLangClient, config: Config) -> None:
    """An attached server may have been started otherwise; without seeds its responses to one prompt would be equal."""
    found, wanted = await server.is_deterministic(), config.engine.deterministic
    if found != wanted:
        raise EngineError(
            "The server was not started as engine.deterministic says",
            where=server.url,
            got=f"deterministic mode {'on' if found else 'off'}",
            expected="on" if wanted else "off",
            fix="start the server with or without --enable-deterministic-inference, or change engine.deterministic",
        )


def _teachers(config: Config, clients: dict[str, SGLangClient], reference: SGLangClient | None) -> TeacherPool:
    teachers = [
        Teacher(domain, client, _model_fact(config.teachers[domain].model, "vocab_size"))
        for domain, client in clients.items()
    ]
    free = Teacher("reference", reference, _model_fact(config.reference.model, "vocab_size")) if reference else None
    return TeacherPool(
        teachers,
        config.scoring.attempts,
        reference=free,
        top_k=config.scoring.top_k,
        student_vocab_size=_model_fact(config.student.model, "vocab_size"),
    )


def _stream(config: Config, prompts: list[Prompt]) -> PromptStream:
    lazy = config.data.lazy
    if lazy is None:
        return PromptStream(prompts, config.seed)
    return LazyStream(prompts, config.seed, lazy, read_pass_rates(lazy.start) if lazy.start else None)


def _model_fact(model: Path, name: str) -> int:
    return json.loads((model / "config.json").read_text())[name]


if __name__ == "__main__":
    run_role("coordinator", coordinate)
