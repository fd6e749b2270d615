"""A faulty server between pool and teacher: no wrong number becomes a score, and every drop has its reason."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FAULTS, FaultyServer
from honest_scorer import VOCAB, HonestScorer
from pools import pool_of

from megatron_opd.config import ServerConfig
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.teachers.handshake import Expected, check_again, shake_hands
from megatron_opd.teachers.pool import Teacher, TeacherPool

TRANSIENT = [kind for kind, fault in FAULTS.items() if fault.transient]
BROKEN = [kind for kind, fault in FAULTS.items() if not fault.transient]
EXPECTED = Expected("teachers.math", Path("math"), ServerConfig(urls=["http://fake"]), VOCAB, 100, 0, 1e-3)


class World:
    """Honest scorers of one model, faulty servers before some of them, and a pool that has shaken hands with all."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack, self.scorer = stack, HonestScorer(0)

    async def pool(self, *kinds: str | None, times: int | None = None, attempts: int = 2, **routing) -> TeacherPool:
        """One replica for each of ``kinds``; None: an honest one."""
        other = await self._stack.enter_async_context(HonestScorer(1, weight_version="models/code").running())
        clients, self.faulty = [], []
        for kind in kinds:
            url = await self._stack.enter_async_context(self.scorer.running())
            if kind is not None:
                self.faulty.append(FaultyServer(url, kind, times=times, other_url=other))
                self.faulty[-1].active = False
                url = await self._stack.enter_async_context(self.faulty[-1].running())
            clients.append(SGLangClient(url, timeout_s=0.3 if kind == "hang" else 10, max_concurrency=16))
            self._stack.push_async_callback(clients[-1].close)
        proven, mistakes = await shake_hands(EXPECTED, clients)
        assert mistakes == []

        async def probe(client: SGLangClient) -> None:
            await check_again(EXPECTED, client, proven[client.url])

        replicas = pool_of(*clients, probe=probe, **routing)
        self._stack.push_async_callback(replicas.close)
        served = {url: proof.served for url, proof in proven.items()}
        for faulty in self.faulty:
            faulty.active = True
        teacher = Teacher("math", replicas, VOCAB, served)
        return TeacherPool([teacher], attempts, reference=None, top_k=0, student_vocab_size=VOCAB)

    def is_right(self, scored: Scored) -> bool:
        """Whether the log-probs are the model's, to the bit."""
        rollout = scored.verified.rollout
        token_ids = [*rollout.prompt.token_ids, *rollout.token_ids.tolist()]
        expected = self.scorer.logprobs(token_ids)[len(rollout.prompt.token_ids) - 1 :]
        return bool((scored.teacher_logprobs == expected).all())


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with AsyncExitStack() as stack:
        yield World(stack)


def rollouts(groups: int, samples: int = 2) -> list[Verified]:
    rng, found = np.random.default_rng(0), []
    for group in range(groups):
        prompt = Prompt(f"p{group}", "math", "?", tuple(rng.integers(4, VOCAB, 6).tolist()), "1")
        for _ in range(samples):
            ids = rng.integers(4, VOCAB - 1, 5)
            rollout = Rollout(prompt, group, ids, np.zeros(5, np.float32), np.zeros(5, np.int64), "stop", "")
            found.append(Verified(rollout, Outcome.CORRECT, "equal"))
    return found


async def score_all(pool: TeacherPool, items: list[Verified]) -> tuple[list[Scored], Counter[str]]:
    """What was scored, and the drops by kind."""
    results = await asyncio.gather(*(pool.score(item) for item in items))
    drops = Counter(result.kind for result in results if isinstance(result, Dropped))
    return [result for result in results if isinstance(result, Scored)], drops


@pytest.mark.parametrize("kind", FAULTS)
async def test_a_lasting_fault_of_the_only_server_drops_every_rollout_with_its_kind(world, kind, quick_retries) -> None:
    pool = await world.pool(kind, failures=1000)
    scored, drops = await score_all(pool, rollouts(3))
    assert scored == [] and sum(drops.values()) == 6 and set(drops) == {FAULTS[kind].kind}
    assert world.faulty[0].spoilt == (12 if FAULTS[kind].transient else 6)


@pytest.mark.parametrize("kind", TRANSIENT)
async def test_a_passing_fault_is_cured_by_another_try(world, kind, quick_retries) -> None:
    pool = await world.pool(kind, times=3, attempts=4, failures=1000)
    scored, drops = await score_all(pool, rollouts(3))
    assert len(scored) == 6 and not drops and all(map(world.is_right, scored))
    assert world.faulty[0].spoilt == 3


@pytest.mark.parametrize("kind", TRANSIENT)
async def test_a_lasting_transient_fault_is_cured_by_another_replica(world, kind, quick_retries) -> None:
    pool = await world.pool(kind, None, failures=3)
    scored, drops = await score_all(pool, rollouts(4))
    assert len(scored) == 8 and not drops and all(map(world.is_right, scored))
    assert world.faulty[0].spoilt >= 1


@pytest.mark.parametrize("kind", BROKEN)
async def test_a_replica_that_answers_wrongly_is_left_out_and_none_of_its_numbers_is_used(world, kind) -> None:
    pool = await world.pool(kind, None, failures=2)
    scored, drops = [], Counter()
    for _ in range(4):
        some, lost = await score_all(pool, rollouts(4))
        scored, drops = scored + some, drops + lost
    assert all(map(world.is_right, scored)) and len(scored) + sum(drops.values()) == 32
    assert set(drops) == {FAULTS[kind].kind} and sum(drops.values()) <= 8  # those under way when it was noticed
    (replica, _) = pool.teachers["math"].replicas.replicas
    assert not replica.in_rotation


async def test_a_replica_that_answers_rightly_again_takes_part_again(world) -> None:
    pool = await world.pool("shifted", None, failures=1)
    await score_all(pool, rollouts(2))
    (replica, _) = pool.teachers["math"].replicas.replicas
    assert not replica.in_rotation
    world.faulty[0].active = False
    async with asyncio.timeout(10):
        while not replica.in_rotation:
            await asyncio.sleep(0.005)
    served = replica.served
    scored, drops = await score_all(pool, rollouts(8))
    assert len(scored) == 16 and not drops and all(map(world.is_right, scored)) and replica.served > served


async def test_several_faults_at_once_are_counted_each(world, quick_retries) -> None:
    pool = await world.pool("shifted", "nan", "error_503", None, failures=1000)
    scored, drops = await score_all(pool, rollouts(40, samples=1))
    assert all(map(world.is_right, scored)) and len(scored) + sum(drops.values()) == 40
    assert set(drops) == {"first_row", "not_finite"} and len(scored) >= 10
