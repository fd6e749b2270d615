"""Routing: least loaded, sticky by key, left out after failures in a row, back after a probe."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from pools import pool_of

from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import BadReply, TransientError
from megatron_opd.runtime.replicas import AllReplicasOut, ReplicaPool


class Server:
    """A client that answers with its URL, or raises ``error``; ``gate`` holds its answers back."""

    def __init__(self, url: str) -> None:
        self.url, self.error, self.gate, self.calls, self.probes = url, None, None, 0, 0

    async def work(self) -> str:
        self.calls += 1
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.url


async def probe(server: Server) -> None:
    server.probes += 1
    if server.error is not None:
        raise server.error


def ask(pool: ReplicaPool, key: object, tokens: int = 1, attempts: int = 1) -> Awaitable[str]:
    return pool.call(key, tokens, attempts, Server.work)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
async def servers():
    return [Server("a"), Server("b")]


async def test_a_request_goes_to_the_server_with_the_fewest_tokens_under_way(servers) -> None:
    pool, gate = pool_of(*servers), asyncio.Event()
    for server in servers:
        server.gate = gate
    tasks = []
    for key, tokens in enumerate([10, 3, 3, 3, 3, 3]):  # 10 for a; then 3, 6, 9 and 12 for b; then 13 for a
        tasks.append(asyncio.create_task(ask(pool, key, tokens)))
        await asyncio.sleep(0)
    assert [replica.tokens for replica in pool.replicas] == [13, 12]
    gate.set()
    assert await asyncio.gather(*tasks) == ["a", "b", "b", "b", "b", "a"]
    assert [replica.tokens for replica in pool.replicas] == [0, 0]


async def test_equally_busy_servers_take_turns(servers) -> None:
    pool = pool_of(*servers)
    assert [await ask(pool, key) for key in range(4)] == ["a", "b", "a", "b"]


async def test_requests_of_one_group_stay_at_one_server_however_busy_it_is(servers) -> None:
    pool = pool_of(*servers)
    home = await ask(pool, "group")
    servers[0].gate = gate = asyncio.Event()
    busy = asyncio.create_task(ask(pool, "group", 1000))
    await until(lambda: servers[0].calls == 2)
    assert await ask(pool, "other") == "b"
    more = asyncio.create_task(ask(pool, "group"))
    await until(lambda: servers[0].calls == 3)
    gate.set()
    assert [home, await busy, await more] == ["a", "a", "a"]


async def test_tokens_are_given_back_when_a_request_fails_or_is_cancelled(servers) -> None:
    pool = pool_of(*servers)
    servers[0].error = EngineError("400")
    with pytest.raises(EngineError, match="400"):
        await ask(pool, 1, 7)
    servers[1].gate = asyncio.Event()
    task = asyncio.create_task(ask(pool, 2, 7))
    await until(lambda: servers[1].calls == 1)
    assert pool.replicas[1].tokens == 7
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert [replica.tokens for replica in pool.replicas] == [0, 0]


async def test_a_failed_request_and_the_rest_of_its_group_move_to_another_server(servers, quick_retries) -> None:
    pool = pool_of(*servers)
    assert await ask(pool, "group") == "a"
    servers[0].error = TransientError("503")
    assert await ask(pool, "group", attempts=2) == "b"
    assert pool.replicas[0].in_rotation  # one failure is not enough
    servers[0].error = None
    assert await ask(pool, "group") == "b"  # whose cache holds the prompt by now


@pytest.mark.parametrize("error", [TransientError("503"), BadReply("shifted")])
async def test_a_server_is_left_out_after_failures_in_a_row_and_comes_back_after_a_probe(servers, error) -> None:
    pool = pool_of(*servers, probe=probe, failures=3)
    broken = servers[0]
    broken.error = error
    for expected in (True, True, False):
        with pytest.raises(EngineError):
            await pool.call("key", 1, 1, lambda _: broken.work())
        pool._homes["key"] = pool.replicas[0]
        assert pool.replicas[0].in_rotation == expected
    assert "3 failures in a row" in pool.replicas[0].describe()
    assert [await ask(pool, key) for key in ("key", 1, 2)] == ["b", "b", "b"]
    await until(lambda: broken.probes >= 2)  # probed, and still left out
    assert not pool.replicas[0].in_rotation and broken.calls == 3
    broken.error = None
    await until(lambda: pool.replicas[0].in_rotation)
    assert {await ask(pool, key) for key in range(10, 14)} == {"a", "b"}
    await pool.close()


async def test_a_success_starts_the_count_of_failures_anew() -> None:
    server = Server("a")
    pool = pool_of(server, failures=2)
    for _ in range(3):
        server.error = TransientError("503")
        with pytest.raises(TransientError):
            await ask(pool, 1)
        server.error = None
        await ask(pool, 1)
    assert pool.replicas[0].in_rotation


async def test_the_first_failure_after_a_return_is_one_too_many_and_the_pause_grows() -> None:
    server = Server("a")
    pool = pool_of(server, probe=probe, failures=3, first_pause_s=0.001, longest_pause_s=0.004)
    (replica,) = pool.replicas
    server.error = TransientError("503")
    for _ in range(3):
        with pytest.raises(TransientError):
            await ask(pool, 1)
    server.error = None
    await until(lambda: replica.in_rotation)
    assert replica.pause_s == 0.001
    server.error = TransientError("503")
    with pytest.raises(TransientError):
        await ask(pool, 1)
    assert not replica.in_rotation
    await until(lambda: server.probes >= 4)
    assert replica.pause_s == 0.004  # and no longer
    server.error = None
    await ask(pool, 1)
    assert replica.pause_s == 0


async def test_a_refused_request_says_nothing_about_the_server(servers) -> None:
    pool = pool_of(*servers, failures=1)
    servers[0].error = EngineError("400: too long")
    with pytest.raises(EngineError, match="too long"):
        await ask(pool, 1)
    assert pool.replicas[0].in_rotation


async def test_a_server_that_was_taken_out_finishes_its_work_and_gets_no_more(servers) -> None:
    pool, gate = pool_of(*servers), asyncio.Event()
    servers[0].gate = gate
    under_way = asyncio.create_task(ask(pool, "group"))
    await until(lambda: servers[0].calls == 1)
    pool.take_out(servers[0], "half of an update")
    assert [await ask(pool, key) for key in ("group", 1, 2)] == ["b", "b", "b"]
    gate.set()
    assert await under_way == "a"
    assert "taken out: half of an update" in pool.replicas[0].describe()
    pool.put_back(servers[0])
    assert "a" in [await ask(pool, key) for key in (3, 4, 5)]


async def test_requests_wait_while_all_servers_are_out_and_go_on_when_one_is_back(servers) -> None:
    pool = pool_of(*servers)
    for server in servers:
        pool.take_out(server, "updating")
    waiting = [asyncio.create_task(ask(pool, key)) for key in range(3)]
    await asyncio.sleep(0.01)
    assert not any(task.done() for task in waiting)
    pool.put_back(servers[1])
    assert await asyncio.gather(*waiting) == ["b", "b", "b"]


async def test_a_request_that_has_waited_too_long_names_every_server_and_why(servers) -> None:
    pool = pool_of(*servers, probe=probe, failures=1, wait_s=0.05)
    servers[0].error = TransientError("A server refused a request", got="503 busy")
    with pytest.raises(TransientError):
        await ask(pool, 1)
    pool.take_out(servers[1], "updating")
    with pytest.raises(AllReplicasOut) as caught:
        await ask(pool, 2)
    assert caught.value.kind == "all_out"
    assert "a: 1 failures in a row" in str(caught.value) and "503 busy" in str(caught.value)
    assert "b: taken out: updating" in str(caught.value) and "wait_s" in str(caught.value)
    await pool.close()
