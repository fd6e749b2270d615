"""No wrong number reaches Scored, whatever a server answers; what may pass is tried again; each fault has its kind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
from aiohttp.test_utils import TestServer
from faulty_proxy import MODEL, PASSING, SPOILT, VERSION, FaultyProxy, tiny_app, true_logprob
from pools import pool_of

from megatron_opd.engines.scores import Served
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.teachers.pool import Teacher, TeacherPool

VOCAB = 512
LASTING = {name: kind for name, (_, kind) in SPOILT.items()} | {"oversized": "too_large"}


class World:
    """A proxy with faults, a good server beside it, and pools of them."""

    def __init__(self, proxy: FaultyProxy, faulty: SGLangClient, good: SGLangClient) -> None:
        self.proxy, self.faulty, self.good = proxy, faulty, good

    def pool(self, *clients: SGLangClient, attempts: int = 1) -> TeacherPool:
        served = {client.url: Served(MODEL, VERSION, 100, reply_model=None) for client in clients}
        teacher = Teacher("math", pool_of(*clients), VOCAB, served)
        return TeacherPool([teacher], attempts, reference=None, top_k=0, student_vocab_size=VOCAB)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with TestServer(tiny_app()) as server:
        good_url = str(server.make_url("")).rstrip("/")
        proxy = FaultyProxy(good_url)
        async with TestServer(proxy.app()) as front:
            urls = str(front.make_url("")), good_url
            clients = [SGLangClient(url, timeout_s=0.5, max_concurrency=8) for url in urls]
            yield World(proxy, *clients)
            for client in clients:
                await client.close()


def verified(number: int = 0) -> Verified:
    prompt = Prompt(f"p{number}", "math", "?", (5, 6, 7 + number), "1")
    ids = np.array([8, 9, 30, 2])
    rollout = Rollout(prompt, number, ids, np.zeros(4, np.float32), np.zeros(4, np.int64), "stop", "")
    return Verified(rollout, Outcome.CORRECT, "equal")


def assert_true(result: Scored | Dropped) -> None:
    expected = [true_logprob(token, 3 + place) for place, token in enumerate([8, 9, 30, 2])]
    assert isinstance(result, Scored), result
    assert result.teacher_logprobs.tolist() == expected and result.prefilled == 7


@pytest.mark.parametrize("fault", LASTING)
async def test_an_answer_that_cannot_be_true_is_a_drop_of_its_kind(world: World, fault: str) -> None:
    world.proxy.fault, world.proxy.times = fault, 1
    pool = world.pool(world.faulty, attempts=3)
    result = await pool.score(verified())
    assert isinstance(result, Dropped) and result.kind == LASTING[fault], result
    assert world.proxy.seen == 1  # the same request would get the same answer
    assert_true(await pool.score(verified()))


@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_passes_is_cured_by_another_try(world: World, fault: str) -> None:
    world.proxy.fault, world.proxy.times = fault, 1
    assert_true(await world.pool(world.faulty, attempts=2).score(verified()))


@pytest.mark.parametrize("fault", PASSING)
async def test_a_fault_that_lasts_is_a_drop_of_its_kind(world: World, fault: str) -> None:
    world.proxy.fault, world.proxy.times = fault, 1
    result = await world.pool(world.faulty).score(verified())
    assert isinstance(result, Dropped) and result.kind == PASSING[fault], result


@pytest.mark.parametrize("fault", PASSING)
async def test_another_replica_takes_over(world: World, fault: str) -> None:
    world.proxy.fault, world.proxy.times = fault, 100
    assert_true(await world.pool(world.faulty, world.good, attempts=2).score(verified()))
    assert world.proxy.seen == 1


async def test_two_answers_that_are_exchanged_are_both_refused(world: World) -> None:
    world.proxy.fault, world.proxy.times = "swapped", 2
    pool = world.pool(world.faulty)
    results = await asyncio.gather(pool.score(verified(0)), pool.score(verified(1)))  # only the prompts differ
    assert [result.kind for result in results] == ["other_request"] * 2
