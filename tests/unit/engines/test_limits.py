"""Deadlines grow with the request, and no more of an answer is read than an honest one can have."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_opd.engines.client import EngineClient
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.sglang_scores import longest_answer
from megatron_opd.runtime import http
from megatron_opd.runtime.http import BadReply, TransientError, fetch, new_session, wait_until_ready


class Endless:
    """Streams a body without an end, and knows how much it has sent and whether the reader has left."""

    def __init__(self) -> None:
        self.sent, self.left = 0, asyncio.Event()

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"1" * 65536)
                self.sent += 65536
        finally:
            self.left.set()


@pytest.fixture
async def endless() -> AsyncIterator[tuple[Endless, str]]:
    handler, app = Endless(), web.Application()
    app.router.add_route("*", "/{path:.*}", handler.stream)
    async with TestServer(app) as server:
        yield handler, str(server.make_url("/"))


async def test_reading_stops_at_the_limit_and_the_connection_is_closed(endless) -> None:
    handler, url = endless
    async with new_session(timeout_s=60) as session:
        with pytest.raises(BadReply, match="longer than it can be") as caught:
            await fetch(session, "GET", url, max_bytes=100_000)
    assert caught.value.kind == "too_large"
    await asyncio.wait_for(handler.left.wait(), 10)
    assert handler.sent < 20 << 20  # what the system's buffers hold


async def test_a_score_has_the_limit_of_its_own_length(endless) -> None:
    _, url = endless
    client = SGLangClient(url, timeout_s=60, max_concurrency=1)
    with pytest.raises(BadReply) as caught:
        await client.prompt_logprobs([1] * 100, start=49, top_k=4)
    await client.close()
    assert f"{longest_answer(51, 4)} bytes" in str(caught.value)
    assert longest_answer(51, 4) < longest_answer(100, 4) < longest_answer(100, 8)


async def test_an_endless_answer_about_readiness_is_not_read_either(endless, monkeypatch) -> None:
    monkeypatch.setattr(http, "READY_BYTES", 1000)
    with pytest.raises(http.EngineError, match="did not become ready"):
        await wait_until_ready(endless[1], timeout_s=0)


async def test_an_answer_of_exactly_the_limit_is_taken() -> None:
    async def thousand(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 1000)

    app = web.Application()
    app.router.add_get("/", thousand)
    async with TestServer(app) as server, new_session(timeout_s=60) as session:
        assert (await fetch(session, "GET", str(server.make_url("/")), max_bytes=1000))[1] == b"x" * 1000
        with pytest.raises(BadReply):
            await fetch(session, "GET", str(server.make_url("/")), max_bytes=999)


@pytest.fixture
async def hanging() -> AsyncIterator[Callable[..., SGLangClient]]:
    """Clients of a server that answers nothing but ``/ready``."""
    clients, app, gate = [], web.Application(), asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        await gate.wait()
        return web.Response()

    async def ready(_: web.Request) -> web.Response:
        return web.Response()

    app.router.add_get("/ready", ready)
    app.router.add_post("/generate", hang)
    async with TestServer(app) as server:

        def make(**options: float) -> SGLangClient:
            clients.append(SGLangClient(str(server.make_url("/")), **options))
            return clients[-1]

        yield make
        gate.set()
        for client in clients:
            await client.close()


async def test_the_deadline_grows_with_the_tokens_of_request_and_answer() -> None:
    rates = {"timeout_s": 10, "prompt_token_s": 0.01, "new_token_s": 0.5}
    client = EngineClient("http://fake", max_concurrency=1, **rates)
    assert [client.deadline_s(*size) for size in ((0, 0), (1000, 0), (1000, 100))] == [10, 20, 70]
    await client.close()


async def test_a_request_gets_the_time_of_its_length(hanging, monkeypatch) -> None:
    given = []

    async def record(*_: object, timeout_s: float, **__: object) -> tuple[int, bytes]:
        given.append(timeout_s)
        return 200, b"{}"

    client = hanging(timeout_s=10, prompt_token_s=0.01, new_token_s=0.5, max_concurrency=1)
    monkeypatch.setattr("megatron_opd.engines.client.fetch", record)
    with pytest.raises(BadReply):  # for want of an id
        await client.prompt_logprobs([1] * 500, start=0)
    assert given == [15]


async def test_a_hanging_server_is_a_transient_timeout(hanging) -> None:
    client = hanging(timeout_s=0.05, max_concurrency=1)
    with pytest.raises(TransientError, match="in time") as caught:
        await client.prompt_logprobs([1, 2], start=0)
    assert caught.value.kind == "timeout"


async def test_the_clock_does_not_run_while_a_request_waits_for_its_turn(monkeypatch) -> None:
    gate, clocks = asyncio.Event(), []

    async def slow(*_: object, **__: object) -> tuple[int, bytes]:
        clocks.append("started")
        await gate.wait()
        return 200, b"{}"

    monkeypatch.setattr("megatron_opd.engines.client.fetch", slow)
    client = SGLangClient("http://fake", timeout_s=10, max_concurrency=2)
    tasks = [asyncio.create_task(client.prompt_logprobs([1, 2], start=0)) for _ in range(5)]
    await asyncio.sleep(0.01)
    assert len(clocks) == 2
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert len(clocks) == 5
    await client.close()


async def test_readiness_is_told_while_every_place_is_taken(hanging) -> None:
    client = hanging(timeout_s=60, max_concurrency=1)
    tasks = [asyncio.create_task(client.prompt_logprobs([1, 2], start=0)) for _ in range(3)]
    await asyncio.sleep(0.01)
    await client.check_ready()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
