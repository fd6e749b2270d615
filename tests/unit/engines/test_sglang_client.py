"""The client refuses answers that break the contract. A fake server gives them; the real one is in tests/contract."""

from __future__ import annotations

import copy

import pytest

from megatron_opd.engines.sglang import Sampling
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


@pytest.fixture
def fake(fake):
    """The fake server with a good answer, to be spoilt by the test."""
    server, _ = fake
    server.answer = copy.deepcopy(GOOD)
    return fake


async def test_a_good_answer_becomes_arrays_with_a_version_for_each_token(fake) -> None:
    server, client = fake
    (generation,) = await client.generate((5, 6), 1, SAMPLING)
    assert generation.token_ids.tolist() == [8, 9, 2] and generation.versions.tolist() == [4, 4, 5]
    assert generation.logprobs == pytest.approx([-0.5, -1.0, -0.1]) and generation.finish_reason == "stop"
    assert generation.top_ids is None
    sampling = {"n": 1, "temperature": 1.0, "max_new_tokens": 16, "stop_token_ids": [2], "top_p": 1.0, "top_k": -1}
    body = {"input_ids": [5, 6], "sampling_params": sampling, "return_logprob": True}
    assert server.posts == [("/generate", body)]


async def test_a_scoring_request_asks_for_rows_only_when_told_to(fake) -> None:
    server, client = fake
    await client.prompt_logprobs([5, 6, 8], start=1)
    await client.prompt_logprobs([5, 6, 8], start=1, top_k=4)
    plain = {
        "input_ids": [5, 6, 8],
        "sampling_params": {"max_new_tokens": 0, "temperature": 0.0},
        "return_logprob": True,
        "logprob_start_len": 1,
    }
    flat = {"return_flat_raw_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
    assert server.posts == [("/generate", plain), ("/generate", plain | {"top_logprobs_num": 4} | flat)]


@pytest.mark.parametrize("name", ["default", "models/math"])
async def test_weights_that_were_never_refreshed_are_version_minus_one(fake, name: str) -> None:
    server, client = fake
    server.answer["meta_info"]["weight_versions"] = [{"version": name, "start": 0, "end": 3}]
    (generation,) = await client.generate((5,), 1, SAMPLING)
    assert generation.versions.tolist() == [-1, -1, -1]


BAD = {
    "fewer log-probs than tokens": {"output_token_logprobs": GOOD["meta_info"]["output_token_logprobs"][:2]},
    "log-probs of other tokens": {"output_token_logprobs": [[-0.5, 8, None], [-1.0, 7, None], [-0.1, 2, None]]},
    "a log-prob that is not finite": {"output_token_logprobs": [[None, 8, None], [-1.0, 9, None], [-0.1, 2, None]]},
    "minus infinity": {"output_token_logprobs": [[float("-inf"), 8, None], [-1.0, 9, None], [-0.1, 2, None]]},
    "versions that do not cover": {"weight_versions": [{"version": "4", "start": 0, "end": 2}]},
    "versions with a hole": {
        "weight_versions": [{"version": "4", "start": 0, "end": 1}, {"version": "5", "start": 2, "end": 3}]
    },
    "an unknown finish": {"finish_reason": {"type": "pause"}},
    "a positive log-prob": {"output_token_logprobs": [[0.5, 8, None], [-1.0, 9, None], [-0.1, 2, None]]},
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
async def test_a_bad_answer_is_an_error(fake, fault: dict) -> None:
    server, client = fake
    server.answer["meta_info"] |= fault
    with pytest.raises(EngineError, match="wrong") as caught:
        await client.generate((5,), 1, SAMPLING)
    assert not isinstance(caught.value, TransientError)


MALFORMED = {
    "rows of another kind": {"output_token_logprobs": [1, 2, 3]},
    "no finish": {"finish_reason": None},
    "versions without a start": {"weight_versions": [{"version": "4", "end": 3}]},
    "a version that is no text": {"weight_versions": [{"version": 4, "start": 0, "end": 3}]},
}


@pytest.mark.parametrize("fault", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_answer_is_an_error(fake, fault: dict) -> None:
    server, client = fake
    server.answer["meta_info"] |= fault
    with pytest.raises(EngineError, match="malformed"):
        await client.generate((5,), 1, SAMPLING)


@pytest.mark.parametrize("answer", [{}, "busy", [None], {"output_ids": [2**70], "meta_info": {}}])
async def test_an_answer_of_another_kind_is_an_error(fake, answer: object) -> None:
    server, client = fake
    server.answer = answer
    with pytest.raises(EngineError, match="malformed"):
        await client.generate((5,), 1, SAMPLING)


async def test_an_answer_that_is_no_json_is_an_error(fake) -> None:
    server, client = fake
    server.text = "<html>a proxy</html>"
    with pytest.raises(EngineError, match="no JSON") as caught:
        await client.generate((5,), 1, SAMPLING)
    assert "/generate" in str(caught.value) and "a proxy" in str(caught.value)


async def test_an_empty_response_is_an_error(fake) -> None:
    server, client = fake
    server.answer["output_ids"] = []
    server.answer["meta_info"] |= {"output_token_logprobs": [], "weight_versions": []}
    with pytest.raises(EngineError, match="length of a response"):
        await client.generate((5,), 1, SAMPLING)


async def test_another_number_of_responses_is_an_error(fake) -> None:
    server, client = fake
    server.answer = [GOOD, GOOD]
    with pytest.raises(EngineError, match="number of responses"):
        await client.generate((5,), 3, SAMPLING)


async def test_an_aborted_response_may_be_tried_again(fake) -> None:
    server, client = fake
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
