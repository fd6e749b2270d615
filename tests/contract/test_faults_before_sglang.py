"""The real SGLang behind a server that spoils its replies: every fault is told by its kind, none gives a number."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest
from faulty_server import FAULTS, FaultyServer
from pools import pool_of

from megatron_opd.config import ServerConfig
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.teachers.handshake import Expected, shake_hands
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.teachers.scoring import score, score_request

VOCAB, TOLERANCE = 512, 1e-4
PROMPT = Prompt("p", "math", "?", (1, 270, 300, 40, 41, 42, 60, 2, 1, 280), "1")


def verified(seed: int) -> Verified:
    ids = np.random.default_rng(seed).integers(0, VOCAB, 12)
    rollout = Rollout(PROMPT, seed, ids, np.zeros(12, np.float32), np.zeros(12, np.int64), "stop", "")
    return Verified(rollout, Outcome.CORRECT, "equal")


async def truth(client: SGLangClient, item: Verified) -> np.ndarray:
    request = score_request(np.array(PROMPT.token_ids), item.rollout.token_ids, VOCAB, 0)
    return (await score(client, request)).logprobs


@pytest.mark.parametrize("kind", FAULTS)
async def test_no_wrong_number_of_a_real_server_becomes_a_score(servers, kind: str) -> None:
    honest = SGLangClient(servers.math, timeout_s=60, max_concurrency=8)
    faulty = FaultyServer(servers.math, kind, other_url=servers.code)
    faulty.active = False
    expected = Expected("teachers.math", Path("math"), ServerConfig(urls=["http://x"]), VOCAB, 100, 0, 1e-3)
    items = [verified(seed) for seed in range(4)]
    async with faulty.running() as url:
        behind = SGLangClient(url, timeout_s=60, max_concurrency=8)
        proven, mistakes = await shake_hands(expected, [behind, honest])
        assert mistakes == []
        served = {place: proof.served for place, proof in proven.items()}
        wanted = [await truth(honest, item) for item in items]
        behind._timeout_s = 1.0 if kind == "hang" else 60.0
        faulty.active = True
        pool = TeacherPool(
            [Teacher("math", pool_of(behind, honest, failures=1000), VOCAB, served)],
            2,
            reference=None,
            top_k=0,
            student_vocab_size=VOCAB,
        )
        results = await asyncio.gather(*(pool.score(item) for item in items))
        await behind.close()
        await honest.close()
    assert faulty.spoilt >= 2
    for result, logprobs in zip(results, wanted, strict=True):
        if isinstance(result, Scored):
            assert np.abs(result.teacher_logprobs - logprobs).max() <= TOLERANCE
    drops = [result.kind for result in results if isinstance(result, Dropped)]
    assert drops == ([] if FAULTS[kind].transient else [FAULTS[kind].kind] * faulty.spoilt)
