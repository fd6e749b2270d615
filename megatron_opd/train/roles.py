"""The processes of a run: who listens where, and the command line of each, on one machine or on the nodes of a job."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from megatron_opd.config import Config, EngineConfig, ServerConfig
from megatron_opd.engines.command import server_argv, server_environment
from megatron_opd.engines.connect import CLIENTS
from megatron_opd.engines.vllm_command import vllm_argv, vllm_environment
from megatron_opd.runtime.env import ENGINE_KEY, TOKEN, VLLM_KEY, child_environment
from megatron_opd.runtime.ports import free_port, take_port
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.train.cluster import LOOPBACK, ONE_MACHINE, Cluster, replica_names

JOBS = ("coordinator", "student")  # these end by themselves; servers must not


@dataclass(frozen=True)
class Role:
    """One process to start."""

    name: str  # also the name of its log
    argv: list[str]
    environment: dict[str, str]
    ready_url: str | None  # answers 200 when it is ready; None when there is nothing to ask


def assign_endpoints(config: Config, cluster: Cluster = ONE_MACHINE) -> Endpoints:
    """Fix every address. Raises ConfigError when a port that was asked for is in use."""
    host = config.coordinator.host or cluster.host("coordinator")
    weights_host = config.refresh.host or cluster.host("student")
    return Endpoints(
        coordinator=f"http://{host}:{take_port(config.coordinator.port, 'coordinator.port', host)}",
        rollout=server_urls(config.rollout.server, "rollout", "rollout.server.port", cluster),
        teachers={
            domain: server_urls(teacher.server, f"teacher-{domain}", f"teachers.{domain}.server.port", cluster)
            for domain, teacher in config.teachers.items()
        },
        reference=server_urls(config.reference.server, "reference", "reference.server.port", cluster)
        if config.reference
        else [],
        weights_host=weights_host,
        weights_port=_port(config.refresh.port, "refresh.port", weights_host, cluster),
    )


def server_urls(server: ServerConfig, role: str, key: str, cluster: Cluster = ONE_MACHINE) -> list[str]:
    """Where they are, or will be. Raises ConfigError when a port that ``key`` asks for is in use."""
    if server.urls:
        return server.urls
    hosts = [cluster.host(name) for name in replica_names(role, server)]
    wanted = [server.port + number if server.port else 0 for number in range(server.replicas)]
    return [f"http://{host}:{_port(port, key, host, cluster)}" for host, port in zip(hosts, wanted, strict=True)]


def _port(wanted: int, key: str, host: str, cluster: Cluster) -> int:
    """Of another node nothing is known: a port that is free here is taken there, and the server tells if it is not."""
    return take_port(wanted, key, host if cluster.allocation is None else LOOPBACK)


def server_roles(config: Config, endpoints: Endpoints) -> list[Role]:
    """The servers that this run starts: rollout engines, teachers and free references where not attached by URL."""
    wanted = [("rollout", config.rollout.server, config.student.model, endpoints.rollout)]
    wanted += [
        (f"teacher-{domain}", teacher.server, teacher.model, endpoints.teachers[domain])
        for domain, teacher in config.teachers.items()
    ]
    if config.reference:
        wanted += [("reference", config.reference.server, config.reference.model, endpoints.reference)]
    engine, seed, top_k = config.engine, config.seed, config.scoring.top_k
    return [
        role
        for name, server, model, urls in wanted
        for role in replica_roles(engine, seed, top_k, name, server, model, urls)
    ]


def replica_roles(
    engine: EngineConfig, seed: int, top_k: int, name: str, server: ServerConfig, model: Path, urls: Sequence[str]
) -> list[Role]:
    """The servers of one model that are to be started: ``name``, or ``name-0``, ``name-1``, ... of several.

    seed: of a server's own draws; top_k: most likely tokens that it may be asked for at each position.
    """
    if server.urls:
        return []
    return [
        Role(
            replica,
            _argv(engine, seed, top_k, server, model, url, frozen=name != "rollout"),  # whose weights change
            _environment(engine, server, number, frozen=name != "rollout"),
            f"{url}{CLIENTS[server.engine].ready_path}",
        )
        for number, (replica, url) in enumerate(zip(replica_names(name, server), urls, strict=True))
    ]


def _argv(
    engine: EngineConfig, seed: int, top_k: int, server: ServerConfig, model: Path, url: str, *, frozen: bool
) -> list[str]:
    if server.engine == "vllm":
        return vllm_argv(engine, server, model, url, seed, top_k)
    return server_argv(engine, server, model, url, seed, frozen=frozen)


def _environment(engine: EngineConfig, server: ServerConfig, replica: int, *, frozen: bool) -> dict[str, str]:
    if server.engine == "vllm":
        return vllm_environment(engine, server, replica)
    return server_environment(engine, server, replica, frozen=frozen)


def ranks_argv(
    job: Literal["worker", "convert"], ranks: int, argument: str, cluster: Cluster = ONE_MACHINE
) -> list[str]:
    """Command line that starts ``ranks`` processes, each of them ``python -m megatron_opd.student.<job> argument``.

    In a job of several nodes it is started once on each of the student's.
    """
    meeting, nodes = f"{cluster.host('student')}:{free_port()}", str(cluster.nodes("student"))
    return [*_python(cluster), "megatron_opd.student", job, str(ranks), meeting, nodes, argument]


def own_roles(
    run: RunDirectory, config: Config, endpoints: Endpoints, token: str, cluster: Cluster = ONE_MACHINE
) -> list[Role]:
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
            ranks_argv("worker", config.world_size, str(run.path), cluster),
            environment | {"OMP_NUM_THREADS": "1"},
            None,
        ),
    ]


def _python(cluster: Cluster) -> list[str]:
    return [cluster.config.trainer_python or sys.executable, "-m"]


def on_nodes(roles: Sequence[Role], cluster: Cluster, token: str) -> list[Role]:
    """The same roles as they are started in ``cluster``.

    Servers of a job listen on addresses that others can reach, so they ask for ``token``, and their clients send it.
    """
    if cluster.allocation is None:
        return list(roles)
    images = dict.fromkeys(("coordinator", "student"), cluster.config.trainer_image)
    return [
        replace(
            role,
            argv=cluster.command(role.name, role.argv, images.get(role.name, cluster.config.engine_image)),
            environment=role.environment | {ENGINE_KEY: token, VLLM_KEY: token},
        )
        for role in roles
    ]
