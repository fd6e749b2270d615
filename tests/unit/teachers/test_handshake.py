"""The handshake: what a replica must prove, every way to fail, and all failures told at once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from honest_scorer import VOCAB, HonestScorer

from megatron_opd.config import ServerConfig
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.teachers.handshake import Expected, check_again, is_model, shake_hands
from megatron_opd.teachers.probes import PARTS, PROBE_TOKENS

MODEL = Path("models/math")
ATTACHED = ServerConfig(urls=["http://fake"])
EXPECTED = Expected("teachers.math", MODEL, ATTACHED, VOCAB, longest=2048, top_k=3, tolerance=1e-3)

Connect = Callable[..., object]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Runs a scorer and gives a client of it."""
    async with AsyncExitStack() as stack:

        async def start(scorer: HonestScorer) -> SGLangClient:
            client = SGLangClient(await stack.enter_async_context(scorer.running()), timeout_s=10, max_concurrency=4)
            stack.push_async_callback(client.close)
            return client

        yield start


async def test_good_replicas_prove_themselves_with_one_probe_cold_warm_and_in_parts(connect) -> None:
    scorers = [HonestScorer(), HonestScorer()]
    clients = [await connect(scorer) for scorer in scorers]
    proven, mistakes = await shake_hands(EXPECTED, clients)
    assert mistakes == [] and set(proven) == {client.url for client in clients}
    for scorer in scorers:
        asked = [(body["logprob_start_len"], body.get("top_logprobs_num", 0)) for body in scorer.requests]
        assert asked == [(0, 3), (0, 0), *((cut - 1, 0) for cut in PARTS)]
        assert len({tuple(body["input_ids"]) for body in scorer.requests}) == 1
    probe = scorers[0].requests[0]["input_ids"]
    assert probe == scorers[1].requests[0]["input_ids"] and len(probe) == PROBE_TOKENS
    again = HonestScorer()
    await shake_hands(EXPECTED, [await connect(again)])
    assert again.requests[0]["input_ids"] != probe  # or a cache could have it


def spoil(**changes: object) -> Callable[[HonestScorer], None]:
    def apply(scorer: HonestScorer) -> None:
        for name, value in changes.items():
            assert hasattr(scorer, name)
            setattr(scorer, name, value)

    return apply


FAILURES = {
    "another model": (spoil(model_path="models/code"), "model", "models/code"),
    "too short a context": (spoil(longest=2047), "too_long", "2047"),
    "other scores from the cache": (spoil(drift_warm=-0.01), "probe", "warm"),
    "other scores in parts": (spoil(drift_part=-0.01), "probe", "prompt of 16"),
    "log-probs above 0": (spoil(table=HonestScorer().table + 30), "positive", "at most 0"),
    "no numbers": (spoil(table=HonestScorer().table * float("nan")), "not_finite", "finite"),
}


@pytest.mark.parametrize(("fault", "kind", "words"), FAILURES.values(), ids=FAILURES.keys())
async def test_every_way_to_fail_has_its_kind(connect, fault, kind: str, words: str) -> None:
    scorer = HonestScorer()
    fault(scorer)
    client = await connect(scorer)
    proven, (mistake,) = await shake_hands(EXPECTED, [client])
    assert not proven and mistake.kind == kind
    assert words in str(mistake) and client.url in str(mistake)


async def test_replicas_that_disagree_are_found_though_each_agrees_with_itself(connect) -> None:
    clients = [await connect(HonestScorer(seed)) for seed in (0, 1, 0)]
    _, (mistake,) = await shake_hands(EXPECTED, clients)
    assert mistake.kind == "probe" and clients[1].url in str(mistake) and f"unlike {clients[0].url}" in str(mistake)


async def test_differences_within_the_tolerance_pass(connect) -> None:
    scorer = HonestScorer()
    scorer.drift_warm = -5e-4
    _, mistakes = await shake_hands(EXPECTED, [await connect(scorer)])
    assert mistakes == []


async def test_what_is_no_engine_says_so() -> None:
    async def hello(_: web.Request) -> web.Response:
        return web.json_response({"hello": "world"})

    app = web.Application()
    app.router.add_get("/{path:.*}", hello)
    async with TestServer(app) as server:
        client = SGLangClient(str(server.make_url("/")), timeout_s=10, max_concurrency=4)
        _, (mistake,) = await shake_hands(EXPECTED, [client])
        await client.close()
    assert mistake.kind == "malformed" and "server.engine" in str(mistake)


async def test_everything_that_is_wrong_with_all_replicas_is_told_at_once(connect) -> None:
    scorers = [HonestScorer() for _ in range(4)]
    spoil(model_path="models/code", longest=100)(scorers[0])
    spoil(drift_warm=-0.01)(scorers[1])
    clients = [await connect(scorer) for scorer in scorers[:3]]
    nobody = SGLangClient("http://127.0.0.1:9", timeout_s=5, max_concurrency=1)
    proven, mistakes = await shake_hands(EXPECTED, [*clients, nobody])
    await nobody.close()
    assert [mistake.kind for mistake in mistakes] == ["model", "too_long", "probe", "no_answer"]
    assert set(proven) == {clients[2].url}


RETURNS = {
    "as before": (spoil(), None),
    "with more memory": (spoil(longest=9000), None),
    "with less, but enough": (spoil(longest=2048), None),
    "with too little": (spoil(longest=2000), "too_long"),
    "not ready": (spoil(ready=False), "server_error"),
    "another model": (spoil(model_path="models/code"), "model"),
    "other weights": (spoil(weight_version="2"), "model"),
    "other scores under the same name": (spoil(table=HonestScorer(1).table), "probe"),
}


@pytest.mark.parametrize(("change", "kind"), RETURNS.values(), ids=RETURNS.keys())
async def test_a_replica_comes_back_only_when_it_is_the_same_model(connect, change, kind: str | None) -> None:
    scorer = HonestScorer()
    client = await connect(scorer)
    proven, _ = await shake_hands(EXPECTED, [client])
    change(scorer)
    if kind is None:
        await check_again(EXPECTED, client, proven[client.url])
    else:
        with pytest.raises(EngineError) as caught:
            await check_again(EXPECTED, client, proven[client.url])
        assert caught.value.kind == kind


NAMES = [
    (ServerConfig(), str(MODEL.resolve()), True),
    (ServerConfig(), "/elsewhere/math", False),  # this run started it, so it is the very folder
    (ATTACHED, "/elsewhere/math", True),
    (ATTACHED, "org/math", True),
    (ATTACHED, "/elsewhere/code", False),
    (ServerConfig(urls=["http://fake"], model_path="expert-7"), "expert-7", True),
    (ServerConfig(urls=["http://fake"], model_path="expert-7"), "/elsewhere/math", False),
]


@pytest.mark.parametrize(("server", "name", "same"), NAMES)
def test_a_server_is_known_by_the_name_of_its_model(server: ServerConfig, name: str, same: bool) -> None:
    assert is_model(name, replace(EXPECTED, server=server)) == same
