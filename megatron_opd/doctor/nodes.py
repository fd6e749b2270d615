"""The nodes of a SLURM job: each is asked by a process on it what it sees and has."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, failed, ok, skipped, warning
from megatron_opd.doctor.gpus import USED_SHARE
from megatron_opd.doctor.machine import SHARED_FOR_GPUS, size
from megatron_opd.doctor.on_nodes import ask_nodes, known_cluster
from megatron_opd.doctor.settings import nearest_folder
from megatron_opd.runtime.slurm import Node
from megatron_opd.train.cluster import Cluster, replica_names, servers_of
from megatron_opd.train.placement import Place
from megatron_opd.train.preflight import models_of

NAME = "nodes"
LIMIT_S = 120.0  # for all processes to start, look and end


def check_nodes(config: Config) -> Iterator[Finding]:
    """Whether all nodes answer, see the run's files, and have the GPUs and free ports that the run expects there."""
    cluster = known_cluster(config)
    if cluster is None:
        yield skipped(NAME, "the roles do not fit: see placement")
        return
    if cluster.allocation is None:
        yield skipped(NAME, "no SLURM job: all is on this machine")
        return
    wanted = json.dumps({"paths": needed_paths(config), "ports": fixed_ports(config, cluster)})
    groups: dict[int | None, list[Node]] = defaultdict(list)
    for node in cluster.allocation.nodes:
        groups[node.het_group].append(node)
    told: list[dict[str, Any]] = []
    for nodes in groups.values():
        asked = replace(cluster, places={"doctor": Place(tuple(nodes), ())})
        told += ask_nodes(asked, "doctor", "megatron_opd.doctor.on_node", [wanted], LIMIT_S)
    yield from judge(cluster.allocation.nodes, {one["node"]: one for one in told})


def needed_paths(config: Config) -> list[str]:
    """What every node must see under the same path: models, prompts, the engine's Python, the run's folder."""
    paths = [*models_of(config).values(), config.data.train, nearest_folder(config.run_dir)]
    if config.cluster.engine_image is None and any(not server.urls for server in servers_of(config).values()):
        paths.append(config.engine.python)
    return [str(path.absolute()) for path in dict.fromkeys(paths)]


def fixed_ports(config: Config, cluster: Cluster) -> dict[str, list[tuple[str, int, str]]]:
    """By node: key, number and address of each port that the config asks for and that is to be opened there."""
    found: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    wanted = [("coordinator.port", "coordinator", config.coordinator.port, config.coordinator.host)]
    wanted.append(("refresh.port", "student", config.refresh.port, config.refresh.host))
    for role, server in servers_of(config).items():
        if server.port and not server.urls:
            names = enumerate(replica_names(role, server))
            wanted += [(f"port of {name}", name, server.port + number, None) for number, name in names]
    for key, role, port, host in wanted:
        if port:
            found[cluster.places[role].nodes[0].name].append((key, port, host or cluster.host(role)))
    return dict(found)


def judge(nodes: tuple[Node, ...], told: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    """What is wrong with which node; one line where nothing is."""
    bad = [*_unseen(told), *_taken(told)]
    for node in nodes:
        bad += _gpus(node, told[node.name])
    yield from bad
    if not any(finding.state == "failed" for finding in bad):
        yield ok(NAME, f"{len(nodes)} answer, see the same files, have free ports; {_gpus_of_all(told)}")


def _unseen(told: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    blind: dict[str, list[str]] = defaultdict(list)
    for name, one in told.items():
        for path in one["missing"]:
            blind[path].append(name)
    for path, names in blind.items():
        fix = "put it on a file system that all nodes mount under the same path, or see cluster.container_mounts"
        yield failed(NAME, f"{', '.join(sorted(names))} cannot see {path}", "the same files on all nodes", fix)


def _taken(told: dict[str, dict[str, Any]]) -> Iterator[Finding]:
    for name, one in told.items():
        for taken in one["taken"]:
            yield failed(NAME, f"{name}: {taken}", "a free port", "0 takes any free port")


def _gpus(node: Node, one: dict[str, Any]) -> Iterator[Finding]:
    gpus = one["gpus"]
    if len(gpus) < node.gpus:
        found = f"{node.name}: SLURM deals out {node.gpus} GPUs, nvidia-smi shows {len(gpus)} {one['gpu_problem']}"
        yield failed(NAME, found.strip(), "all of them", "see the driver on that node; in a container: --nv, or pyxis")
    used = [used for _, memory, used, _ in gpus if used > USED_SHARE * memory]
    if used:
        found = f"{node.name}: {len(used)} GPUs in use already, up to {max(used):,} MB"
        yield warning(NAME, found, "free GPUs", "nvidia-smi there shows whose processes")
    if gpus and one["shared_memory"] < SHARED_FOR_GPUS:
        found, needed = (
            f"{node.name}: {size(one['shared_memory'])} free in /dev/shm",
            f"{size(SHARED_FOR_GPUS)} for NCCL",
        )
        yield warning(NAME, found, needed, "mount a larger one; in a container: --ipc=host")


def _gpus_of_all(told: dict[str, dict[str, Any]]) -> str:
    kinds = Counter(f"{name}, driver {driver}" for one in told.values() for name, _, _, driver in one["gpus"])
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items()) or "no GPUs"
