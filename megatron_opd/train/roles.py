"""The processes of a run on one machine: who listens where, and the command line of each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import Config, ServerConfig
from megatron_opd.engines.command import server_argv, server_environment
from megatron_opd.engines.connect import CLIENTS
from megatron_opd.engines.vllm_command import vllm_argv, vllm_environment
from megatron_opd.runtime.env import TOKEN, child_environment
from megatron_opd.runtime.ports import free_port, take_port
from megatron_opd.runtime.rundir import Endpoints, RunDirectory


@dataclass(frozen=True)
class Role:
    """One process to start."""

    name: str  # also the name of its log
    argv: list[str]
    environment: dict[str, str]
    ready_url: str | None  # answers 200 when it is ready; None when there is nothing to ask


def assign_endpoints(config: Config) -> Endpoints:
    """Fix every address. Raises ConfigError when a port that was asked for is in use."""
    host = config.coordinator.host
    return Endpoints(
        coordinator=f"http://{host}:{take_port(config.coordinator.port, 'coordinator.port', host)}",
        rollout=server_urls(config.rollout.server, "rollout.server.port"),
        teachers={
            domain: server_urls(teacher.server, f"teachers.{domain}.server.port")
            for domain, teacher in config.teachers.items()
        },
        reference=server_urls(config.reference.server, "reference.server.port") if config.reference else [],
        weights_host=config.refresh.host,
        weights_port=take_port(config.refresh.port, "refresh.port", config.refresh.host),
    )


def server_urls(server: ServerConfig, key: str) -> list[str]:
    """Where they are, or will be. Raises ConfigError when a port that ``key`` asks for is in use."""
    wanted = [server.port + number if server.port else 0 for number in range(server.replicas)]
    return server.urls or [f"http://127.0.0.1:{take_port(port, key)}" for port in wanted]


def server_roles(config: Config, endpoints: Endpoints) -> list[Role]:
    """The servers that this run starts: rollout engines, teachers and free references where not attached by URL."""
    wanted = [("rollout", config.rollout.server, config.student.model, endpoints.rollout)]
    wanted += [
        (f"teacher-{domain}", teacher.server, teacher.model, endpoints.teachers[domain])
        for domain, teacher in config.teachers.items()
    ]
    if config.reference:
        wanted += [("reference", config.reference.server, config.reference.model, endpoints.reference)]
    return [role for name, server, model, urls in wanted for role in replica_roles(config, name, server, model, urls)]


def replica_roles(config: Config, name: str, server: ServerConfig, model: Path, urls: Sequence[str]) -> list[Role]:
    """The servers of one model that are to be started: ``name``, or ``name-0``, ``name-1``, ... of several."""
    if server.urls:
        return []
    names = [name] if len(urls) == 1 else [f"{name}-{number}" for number in range(len(urls))]
    return [
        Role(
            replica,
            _argv(config, server, model, url),
            _environment(config, server, number),
            f"{url}{CLIENTS[server.engine].ready_path}",
        )
        for number, (replica, url) in enumerate(zip(names, urls, strict=True))
    ]


def _argv(config: Config, server: ServerConfig, model: Path, url: str) -> list[str]:
    if server.engine == "vllm":
        return vllm_argv(config.engine, server, model, url, config.seed, config.scoring.top_k)
    frozen = server is not config.rollout.server
    return server_argv(config.engine, server, model, url, config.seed, frozen=frozen)


def _environment(config: Config, server: ServerConfig, replica: int) -> dict[str, str]:
    environment = vllm_environment if server.engine == "vllm" else server_environment
    return environment(config.engine, server, replica)


def own_roles(run: RunDirectory, endpoints: Endpoints, token: str) -> list[Role]:
    """The coordinator and the student."""
    environment = child_environment(**{TOKEN: token})
    python = [sys.executable, "-m"]
    return [
        Role(
            "coordinator",
            [*python, "megatron_opd.coordinator", str(run.path)],
            environment,
            f"{endpoints.coordinator}/health",
        ),
        Role(
            "student",
            [*python, "megatron_opd.student", str(run.path), str(free_port())],
            environment | {"OMP_NUM_THREADS": "1"},
            None,
        ),
    ]
