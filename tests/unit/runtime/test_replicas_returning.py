"""Servers that come back: with tries left for the request, and at once where a refresh has proven them."""

from __future__ import annotations

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

    async def is_started_again(server: Server) -> None:
        server.fails = False

    pool = pool_of(a, probe=is_started_again, failures=2)
    a.fails = True
    assert await pool.call("g", 1, 2, Server.work) == a.url and a.calls == 3
    hopeless = pool_of(a, failures=1)  # every probe passes, every request fails
    a.fails, a.calls = True, 0
    with pytest.raises(TransientError):
        await hopeless.call("g", 1, 3, Server.work)
    assert a.calls == 3
    await pool.close()
    await hopeless.close()


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
