"""Servers that come back: with tries left for the request, and at once where a refresh has proven them."""

from __future__ import annotations

import asyncio

import pytest
from pools import pool_of

from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import TransientError


class Server:
    """Counts its calls, and fails while it is told to."""

    def __init__(self, url: str) -> None:
        self.url, self.fails, self.calls = url, False, 0

    async def work(self) -> str:
        self.calls += 1
        if self.fails:
            raise TransientError("busy", where=self.url)
        return self.url


async def ready(server: Server) -> None:
    if server.fails:
        raise EngineError("still out", where=server.url)


def servers(count: int) -> list[Server]:
    return [Server(f"http://s{number}") for number in range(count)]


async def test_tries_that_end_in_a_rest_do_not_use_up_those_of_the_request() -> None:
    (a,) = servers(1)
    pool = pool_of(a, probe=ready, failures=2)
    outages = 0

    async def mortal(server: Server) -> str:
        nonlocal outages
        if server.calls == 2 and outages < 2:  # dies, is started again, and proves itself
            server.calls, outages = 0, outages + 1
            server.fails = True
            asyncio.get_running_loop().call_later(0.05, setattr, server, "fails", False)
        return await server.work()

    a.calls = 2
    assert await pool.call("g", 1, 3, mortal) == a.url and outages == 1
    a.calls, outages = 2, -9
    a.fails = True
    with pytest.raises(TransientError):  # but it does not go on forever
        await pool_of(a, failures=1).call("g", 1, 3, Server.work)
    assert a.calls == 5
    await pool.close()


async def test_what_a_refresh_has_proven_serves_at_once() -> None:
    a, b = servers(2)
    pool = pool_of(a, b, probe=ready, failures=1, first_pause_s=60.0)
    a.fails = True
    with pytest.raises(TransientError):
        await pool.call("g", 1, 1, Server.work)
    assert not pool.replicas[0].in_rotation
    pool.follow({b.url: "half applied"})
    assert pool.choose("g").client is a and pool.replicas[1].taken_out == "half applied"
    pool.follow({})
    assert pool.any_in_rotation and pool.replicas[1].in_rotation
    await pool.close()
