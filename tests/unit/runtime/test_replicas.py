"""Who gets a request, who is left out, and who comes back: without a server."""

from __future__ import annotations

import asyncio

import pytest
from pools import pool_of

from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import TransientError
from megatron_opd.runtime.replicas import AllReplicasOut


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


async def test_the_least_loaded_gets_a_new_group_and_a_group_stays() -> None:
    a, b = servers(2)
    pool = pool_of(a, b)
    pool.replicas[0].tokens = 50
    assert pool.choose("g1").client is b
    pool.replicas[1].tokens = 900
    assert pool.choose("g1").client is b and pool.choose("g2").client is a


async def test_a_group_moves_when_its_replica_fails() -> None:
    a, b = servers(2)
    pool = pool_of(a, b, probe=ready)
    a.fails = True
    assert await pool.call("g", 1, 2, Server.work) == b.url
    assert await pool.call("g", 1, 1, Server.work) == b.url and a.calls == 1
    assert [replica.tokens for replica in pool.replicas] == [0, 0]
    await pool.close()


async def test_failures_in_a_row_rest_a_replica_until_its_probe_passes() -> None:
    (a,) = servers(1)
    pool = pool_of(a, probe=ready, failures=2)
    a.fails = True
    for _ in range(2):
        with pytest.raises(TransientError):
            await pool.call("g", 1, 1, Server.work)
    assert pool.choose("g") is None
    waiting = asyncio.create_task(pool.call("g", 1, 1, Server.work))
    await asyncio.sleep(0.05)
    assert not waiting.done() and a.calls == 2  # probes are not requests
    a.fails = False
    assert await waiting == a.url and pool.replicas[0].failures == 0
    await pool.close()


async def test_one_failure_after_a_return_is_enough_for_the_next_rest() -> None:
    (a,) = servers(1)
    pool = pool_of(a, failures=3)  # every probe passes
    a.fails = True
    for calls in (3, 4):
        while a.calls < calls:
            with pytest.raises(TransientError):
                await pool.call("g", 1, 1, Server.work)
        assert pool.choose("g") is None
    await pool.close()


async def test_when_all_are_out_for_too_long_the_error_names_them() -> None:
    a, b = servers(2)
    pool = pool_of(a, b, wait_s=0.05)
    pool.take_out(a, "weights are half applied")
    pool.take_out(b, "restarting")
    with pytest.raises(AllReplicasOut) as caught:
        await pool.call("g", 1, 5, Server.work)
    assert caught.value.kind == "all_out"
    assert all(part in str(caught.value) for part in (a.url, b.url, "half applied", "restarting"))
    waiting = asyncio.create_task(pool.call("g", 1, 1, Server.work))
    await asyncio.sleep(0)
    pool.put_back(b)
    assert await waiting == b.url


async def test_what_another_try_cannot_cure_is_no_failure_of_the_replica() -> None:
    (a,) = servers(1)
    pool = pool_of(a, failures=1)

    async def refused(_: Server) -> None:
        raise EngineError("too long")

    with pytest.raises(EngineError, match="too long"):
        await pool.call("g", 1, 3, refused)
    assert pool.choose("g").client is a


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
