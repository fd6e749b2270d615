"""Pools of clients that a test made, with pauses that no test has to wait for."""

from __future__ import annotations

from megatron_opd.config import RoutingConfig
from megatron_opd.runtime.replicas import ReplicaPool


async def always_ready(_: object) -> None:
    """A probe that every client passes."""


def pool_of(*clients: object, probe: object = always_ready, **routing: float) -> ReplicaPool:
    """A pool of ``clients``; a client without a URL gets one."""
    for number, client in enumerate(clients):
        if not hasattr(client, "url"):
            client.url = f"http://fake-{number}"
    quick = {"first_pause_s": 0.01, "longest_pause_s": 0.02, "wait_s": 5.0}
    return ReplicaPool("test", clients, probe, RoutingConfig(**(quick | routing)))
