"""The coordinator's HTTP side, over real sockets."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp.test_utils import TestClient, TestServer

from megatron_opd.coordinator import app as app_module
from megatron_opd.coordinator.app import BatchBoard, make_app
from megatron_opd.observe.prometheus import Exposition
from megatron_opd.runtime.messages import RefreshReport

AUTH = {"Authorization": "Bearer secret"}


def report(version: int) -> dict:
    return RefreshReport(version=version, refresh_s=0.1, refresh_bytes=4, probe_difference=0.0).model_dump()


@pytest.fixture
async def served():
    board = BatchBoard()
    async with TestClient(TestServer(make_app(board, "secret", Exposition()))) as client:
        yield board, client


async def test_a_token_is_needed_but_for_health_and_metrics(served) -> None:
    _, client = served
    assert (await client.get("/health")).status == 200
    assert (await client.get("/metrics")).status == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
        assert (await client.get("/v1/batch/0/0", headers=headers)).status == 401
        assert (await client.post("/v1/refreshed", headers=headers, json=report(0))).status == 401


async def test_a_rank_waits_for_its_batch_and_may_ask_twice(served) -> None:
    board, client = served
    request = asyncio.create_task(client.get("/v1/batch/3/1", headers=AUTH))
    await asyncio.sleep(0.05)
    assert not request.done()
    await board.publish(3, [b"zero", b"one"])
    assert await (await request).read() == b"one"
    assert await (await client.get("/v1/batch/3/1", headers=AUTH)).read() == b"one"
    assert (await client.get("/v1/batch/3/2", headers=AUTH)).status == 404


async def test_a_batch_that_is_not_there_yet_is_204(served, monkeypatch) -> None:
    monkeypatch.setattr(app_module, "LONG_POLL_S", 0.05)
    _, client = served
    assert (await client.get("/v1/batch/0/0", headers=AUTH)).status == 204


async def test_reports_come_in_order_and_wake_the_loop(served) -> None:
    board, client = served
    live = asyncio.create_task(board.live(1))
    assert (await client.post("/v1/refreshed", headers=AUTH, json=report(1))).status == 409
    assert (await client.post("/v1/refreshed", headers=AUTH, json=report(0))).status == 200
    assert not live.done()
    assert (await client.post("/v1/refreshed", headers=AUTH, json=report(1))).status == 200
    assert (await live).version == 1


@pytest.mark.parametrize("body", [b"", b"{}", b'{"version": "x"}', b"\x80\x04K\x01."])
async def test_a_malformed_report_is_400(served, body: bytes) -> None:
    _, client = served
    answer = await client.post("/v1/refreshed", headers=AUTH, data=body)
    assert answer.status == 400 and "error" in await answer.json()


async def test_a_huge_body_is_refused(served) -> None:
    _, client = served
    answer = await client.post("/v1/refreshed", headers=AUTH, data=b"x" * (app_module.MAX_REPORT_BYTES + 1))
    assert answer.status == 413


async def test_a_resumed_run_counts_on_and_an_ended_one_has_no_further_batch() -> None:
    board = BatchBoard(first=4)
    async with TestClient(TestServer(make_app(board, "secret", Exposition()))) as client:
        assert (await client.post("/v1/refreshed", headers=AUTH, json=report(0))).status == 409
        assert (await client.post("/v1/refreshed", headers=AUTH, json=report(4))).status == 200
        assert (await board.live(4)).version == 4 and board.expected == 5
        request = asyncio.create_task(client.get("/v1/batch/5/0", headers=AUTH))
        await asyncio.sleep(0.05)
        await board.end()
        answer = await request
        assert answer.status == 200 and await answer.read() == b""
