"""The processes of a run on one machine: who listens where, and the command line of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_opd.config import Config, ServerConfig
from megatron_opd.engines.command import server_argv, server_environment
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
        rollout=server_url(config.rollout.server, "rollout.server.port"),
        teachers={
            domain: server_url(teacher.server, f"teachers.{domain}.server.port")
            for domain, teacher in config.teachers.items()
        },
        reference=server_url(config.reference.server, "reference.server.port") if config.reference else None,
        weights_host=config.refresh.host,
        weights_port=take_port(config.refresh.port, "refresh.port", config.refresh.host),
    )


def server_url(server: ServerConfig, key: str) -> str:
    """Where it is, or will be. Raises ConfigError when the port that ``key`` asks for is in use."""
    return server.url or f"http://127.0.0.1:{take_port(server.port, key)}"


def server_roles(config: Config, endpoints: Endpoints) -> list[Role]:
    """The servers that this run starts: rollout engine, teachers and free reference where not attached by URL."""
    wanted = [("rollout", config.rollout.server, config.student.model, endpoints.rollout)]
    wanted += [
        (f"teacher-{domain}", teacher.server, teacher.model, endpoints.teachers[domain])
        for domain, teacher in config.teachers.items()
    ]
    if config.reference:
        wanted += [("reference", config.reference.server, config.reference.model, endpoints.reference)]
    return [server_role(config, name, server, model, url) for name, server, model, url in wanted if server.url is None]


def server_role(config: Config, name: str, server: ServerConfig, model: Path, url: str) -> Role:
    """A server of ``model`` at ``url``, to be started."""
    argv = server_argv(config.engine, server, model, url, config.seed)
    return Role(name, argv, server_environment(config.engine, server), f"{url}/ready")


def ranks_argv(job: Literal["worker", "convert"], ranks: int, argument: str) -> list[str]:
    """Command line that starts ``ranks`` processes, each of them ``python -m megatron_opd.student.<job> argument``."""
    return [sys.executable, "-m", "megatron_opd.student", job, str(ranks), str(free_port()), argument]


def own_roles(run: RunDirectory, endpoints: Endpoints, token: str) -> list[Role]:
    """The coordinator and the student."""
    environment = child_environment(**{TOKEN: token})
    return [
        Role(
            "coordinator",
            [sys.executable, "-m", "megatron_opd.coordinator", str(run.path)],
            environment,
            f"{endpoints.coordinator}/health",
        ),
        Role(
            "student",
            ranks_argv("worker", run.config().world_size, str(run.path)),
            environment | {"OMP_NUM_THREADS": "1"},
            None,
        ),
    ]
