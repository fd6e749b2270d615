"""The client refuses answers that break the contract. A fake server gives them; the real one is in tests/contract."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_opd.engines.sglang import Sampling, SGLangClient, WeightBucket
from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import TransientError

GOOD = {
    "output_ids": [8, 9, 2],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 2},
        "output_token_logprobs": [[-0.5, 8, None], [-1.0, 9, None], [-0.1, 2, None]],
        "weight_versions": [{"version": "4", "start": 0, "end": 2}, {"version": "5", "start": 2, "end": 3}],
    },
}
SAMPLING = Sampling(16, 1.0, (2,))


class FakeServer:
    """Answers every POST with ``answer`` and ``status``, and remembers paths and bodies."""

    def __init__(self) -> None:
        self.answer: object = GOOD
        self.status = 200
        self.release = "0.5.21"
        self.posts: list[tuple[str, dict]] = []

    async def post(self, request: web.Request) -> web.Response:
        self.posts.append((request.path, await request.json()))
        return web.json_response(self.answer, status=self.status)

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.release})


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, SGLangClient]]:
    server, app = FakeServer(), web.Application()
    app.router.add_get("/server_info", server.info)
    app.router.add_post("/{path:.*}", server.post)
    async with TestServer(app) as running:
        client = SGLangClient(str(running.make_url("/")), timeout_s=5, max_concurrency=4)
        yield server, client
        await client.close()


async def test_a_good_answer_becomes_arrays_with_a_version_for_each_token(fake) -> None:
    server, client = fake
    (generation,) = await client.generate((5, 6), 1, SAMPLING)
    assert generation.token_ids.tolist() == [8, 9, 2] and generation.versions.tolist() == [4, 4, 5]
    assert generation.logprobs == pytest.approx([-0.5, -1.0, -0.1]) and generation.finish_reason == "stop"
    path, body = server.posts[0]
    assert path == "/generate" and body["input_ids"] == [5, 6] and body["sampling_params"]["n"] == 1


async def test_weights_that_were_never_refreshed_are_version_minus_one(fake) -> None:
    server, client = fake
    server.answer = copy.deepcopy(GOOD)
    server.answer["meta_info"]["weight_versions"] = [{"version": "default", "start": 0, "end": 3}]
    (generation,) = await client.generate((5,), 1, SAMPLING)
    assert generation.versions.tolist() == [-1, -1, -1]


BAD = {
    "fewer log-probs than tokens": {"output_token_logprobs": GOOD["meta_info"]["output_token_logprobs"][:2]},
    "log-probs of other tokens": {"output_token_logprobs": [[-0.5, 8, None], [-1.0, 7, None], [-0.1, 2, None]]},
    "a log-prob that is not finite": {"output_token_logprobs": [[None, 8, None], [-1.0, 9, None], [-0.1, 2, None]]},
    "versions that do not cover": {"weight_versions": [{"version": "4", "start": 0, "end": 2}]},
    "versions with a hole": {
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 2, "end": 3}]
    },
    "an unknown finish": {"finish_reason": {"type": "pause"}},
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
async def test_a_bad_answer_is_an_error(fake, fault: dict) -> None:
    server, client = fake
    server.answer = copy.deepcopy(GOOD)
    server.answer["meta_info"] |= fault
    with pytest.raises(EngineError, match="wrong") as caught:
        await client.generate((5,), 1, SAMPLING)
    assert not isinstance(caught.value, TransientError)


async def test_another_number_of_responses_is_an_error(fake) -> None:
    server, client = fake
    server.answer = [GOOD, GOOD]
    with pytest.raises(EngineError, match="number of responses"):
        await client.generate((5,), 3, SAMPLING)


async def test_an_aborted_response_may_be_tried_again(fake) -> None:
    server, client = fake
    server.answer = copy.deepcopy(GOOD)
    server.answer["meta_info"]["finish_reason"] = {"type": "abort", "message": "flushed"}
    with pytest.raises(TransientError, match="aborted"):
        await client.generate((5,), 1, SAMPLING)


@pytest.mark.parametrize(("status", "transient"), [(400, False), (404, False), (500, True), (503, True)])
async def test_an_error_status_carries_the_servers_words(fake, status: int, transient: bool) -> None:
    server, client = fake
    server.answer, server.status = {"error": {"message": "too long"}}, status
    with pytest.raises(EngineError, match="refused") as caught:
        await client.generate((5,), 1, SAMPLING)
    assert isinstance(caught.value, TransientError) == transient
    assert str(status) in str(caught.value) and "too long" in str(caught.value)


async def test_a_weight_update_that_failed_is_an_error(fake) -> None:
    server, client = fake
    server.answer = {"success": False, "message": "partially updated"}
    with pytest.raises(EngineError, match="update_weights_from_distributed") as caught:
        await client.receive_bucket(WeightBucket(["a"], ["float32"], [[1]]), "g", flush=True, version=1)
    assert "partially updated" in str(caught.value)


@pytest.mark.parametrize(("release", "brackets"), [("0.5.20", False), ("0.5.21", True), ("0.6.0.dev1+cpu", True)])
async def test_brackets_only_where_the_server_knows_them(fake, release: str, brackets: bool) -> None:
    server, client = fake
    server.release, server.answer = release, {"success": True}
    await client.begin_weight_update()
    await client.end_weight_update()
    paths = [path for path, _ in server.posts]
    assert paths == (["/begin_weight_update", "/end_weight_update"] if brackets else [])
