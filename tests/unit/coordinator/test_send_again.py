"""Weights that are asked for again: all ranks send them equally often before the batch, whoever asks when."""

from __future__ import annotations

import asyncio
import random

import pytest
from aiohttp.test_utils import TestClient, TestServer
from pools import pool_of

from megatron_opd.coordinator import engines
from megatron_opd.coordinator.app import BatchBoard, SendAgain, make_app
from megatron_opd.coordinator.engines import holds, keep_supplied
from megatron_opd.errors import EngineError
from megatron_opd.observe.prometheus import Exposition
from megatron_opd.observe.recorder import Recorder, read_events
from megatron_opd.runtime.messages import RefreshReport
from megatron_opd.student import coordinator_client
from megatron_opd.student.coordinator_client import CoordinatorClient

RANKS = 3


def report(version: int, resend: int = 0, **more: object) -> RefreshReport:
    return RefreshReport(version=version, resend=resend, refresh_s=0, refresh_bytes=0, probe_difference=0, **more)


class Ranks:
    """What each rank does, in order; the first one reports when all have come to a sending."""

    def __init__(self, board: BatchBoard, seed: int) -> None:
        self.board, self.random = board, random.Random(seed)
        self.did: list[list[object]] = [[] for _ in range(RANKS)]
        self.meeting = asyncio.Barrier(RANKS)

    async def run(self, rank: int) -> None:
        resent = 0
        while (found := await self.board.batch(0, rank, 0.001 * self.random.randrange(1, 4), resent)) != b"":
            await asyncio.sleep(0.001 * self.random.randrange(4))
            if found is SendAgain:
                resent += 1
                self.did[rank].append(resent)
                await self.meeting.wait()  # weights are gathered by all ranks together
                if rank == 0:
                    assert await self.board.refreshed(report(0, resent))
            elif found is not None:
                self.did[rank].append(found)
                return


@pytest.mark.parametrize("seed", range(8))
async def test_all_ranks_send_again_before_the_batch_however_they_interleave(seed: int) -> None:
    board = BatchBoard()
    await board.refreshed(report(0))
    ranks = Ranks(board, seed)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        for rank in range(RANKS):
            group.create_task(ranks.run(rank))
        await asyncio.sleep(0.002)
        assert (await board.send_again()).resend == 1
        asking = group.create_task(board.send_again())
        await asyncio.sleep(0.001 * (seed % 3))
        await board.publish(0, [b"batch"] * RANKS)  # amid the second one
    assert ranks.did == [[1, 2, b"batch"]] * RANKS or (seed % 3 == 0 and asking.result() is None)
    assert ranks.did[0] == ranks.did[1] == ranks.did[2] and ranks.did[0][-1] == b"batch"


async def test_what_is_being_trained_is_not_sent_again() -> None:
    board = BatchBoard()
    assert await board.send_again() is None  # no weights yet
    await board.refreshed(report(0))
    await board.publish(0, [b"batch"])
    async with asyncio.timeout(5):
        assert await board.send_again() is None  # weights 1 come anyway
    await board.refreshed(report(1))
    await board.end()
    assert await board.send_again() is None


async def test_reports_that_nobody_asked_for_are_refused_and_repeated_ones_are_not() -> None:
    board = BatchBoard()
    assert not await board.refreshed(report(0, 1)) and await board.refreshed(report(0))
    assert await board.refreshed(report(0)) and not await board.refreshed(report(0, 1))
    asking = asyncio.create_task(board.send_again())
    await asyncio.sleep(0)
    assert not await board.refreshed(report(0, 2)) and await board.refreshed(report(0, 1, out={"http://b": "dead"}))
    assert (await asking).out == {"http://b": "dead"} and await board.refreshed(report(0, 1, out={"http://b": "dead"}))
    assert board.expected == 1 and await board.refreshed(report(1)) and len(board.reports) == 2


async def test_over_http_a_rank_is_told_to_send_again_and_leaves_when_the_run_is_over(monkeypatch) -> None:
    monkeypatch.setattr(coordinator_client, "token", lambda: "secret")
    board, sent = BatchBoard(), []
    await board.refreshed(report(0))
    async with TestServer(make_app(board, "secret", Exposition())) as server:
        client = CoordinatorClient(str(server.make_url("")).rstrip("/"))

        async def send_again(number: int) -> None:
            sent.append(number)
            await client.refreshed(report(0, number))

        asking = asyncio.create_task(client.batch(0, 0, send_again))
        assert [(await board.send_again()).resend for _ in range(2)] == [1, 2] == sent
        await board.end(ranks=1)  # returns when the rank has been told
        assert await asking is None
        await client.close()
        async with TestClient(server) as plain:
            headers = {"Authorization": "Bearer secret"}
            assert (await plain.get("/v1/batch/0/0?resent=x", headers=headers)).status == 400


class Engine:
    """An engine that can be started again."""

    def __init__(self, url: str) -> None:
        self.url, self.version, self.answers = url, "0", True

    async def check_ready(self) -> None:
        if not self.answers:
            raise EngineError("no answer", kind="no_answer")

    async def weight_version(self) -> str:
        return self.version


async def test_weights_are_asked_for_when_no_engine_serves_and_one_has_lost_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(engines, "LOOK_S", 0.005)
    board, recorder = BatchBoard(), Recorder(tmp_path / "events", tmp_path / "metrics")
    await board.refreshed(report(0))
    a, b = Engine("http://a"), Engine("http://b")
    pool = pool_of(a, b, probe=lambda engine: holds(engine, board), failures=1)
    asked: list[object] = []

    async def student() -> None:
        while await board.batch(0, 0, 3600, len(asked)) is SendAgain:
            asked.append(True)
            a.version = "0"
            await board.refreshed(report(0, len(asked), live=[a.url], out={b.url: "no answer"}))

    tasks = [asyncio.create_task(keep_supplied(pool, board, recorder)), asyncio.create_task(student())]
    a.version = "default"  # was started again; b serves
    pool.take_out(a, "dead")
    await asyncio.sleep(0.05)
    assert not asked
    a.answers = b.answers = False  # dies too
    pool.take_out(b, "dead")
    await asyncio.sleep(0.05)
    assert not asked  # nobody could take the weights
    a.answers = True
    async with asyncio.timeout(5):
        while not pool.any_in_rotation:
            await asyncio.sleep(0.005)
    assert asked == [True] and pool.choose("g").client is a and not pool.replicas[1].in_rotation
    (event,) = read_events(tmp_path / "events")
    assert event["event"] == "weights_sent_again" and event["live"] == [a.url]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_an_engine_with_other_weights_than_the_live_ones_stays_out() -> None:
    board, engine = BatchBoard(), Engine("http://a")
    await board.refreshed(report(0))
    await holds(engine, board)
    engine.version = "default"
    with pytest.raises(EngineError, match="other weights than those that are live"):
        await holds(engine, board)
