"""The scoring contract: one good reply is taken to the bit, every bad one is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from megatron_opd.engines.sglang import split_rows
from megatron_opd.records import Dropped, Outcome, Prompt, Rollout, Scored, Verified
from megatron_opd.runtime.http import TransientError
from megatron_opd.teachers.pool import Teacher, TeacherPool
from megatron_opd.teachers.scoring import ScoringError, score

VOCAB = 512
PROMPT, RESPONSE = np.array([5, 6, 7]), np.array([8, 511, 2])
ROWS = [[None, 7, None], [-0.5, 8, None], [-1.5, 0, None], [-0.25, 2, None]]  # 511, the last id, is echoed as 0


class FakeClient:
    """Answers each request with the next of the given replies; an exception is raised."""

    url = "http://fake"

    def __init__(self, *replies: dict | Exception) -> None:
        self.replies, self.requests = list(replies), []

    async def prompt_logprobs(self, token_ids: list[int], start: int) -> dict:
        self.requests.append((token_ids, start))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def good_reply() -> dict:
    return {
        "meta_info": {
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": 6,
            "cached_tokens": 2,
            "input_token_logprobs": copy.deepcopy(ROWS),
        }
    }


async def test_a_good_reply_gives_the_response_log_probs_and_asks_for_nothing_else() -> None:
    client = FakeClient(good_reply())
    values = await score(client, PROMPT, RESPONSE, VOCAB)
    assert values.dtype == np.float32 and values.tolist() == [-0.5, -1.5, -0.25]
    assert client.requests == [([5, 6, 7, 8, 511, 2], 2)]


def rows_with(index: int, row: list) -> list:
    return [row if i == index else old for i, old in enumerate(ROWS)]


BAD = {
    "one row short": {"input_token_logprobs": ROWS[:-1]},
    "one row more": {"input_token_logprobs": [*ROWS, [-1.0, 2, None]]},
    "shifted by one": {"input_token_logprobs": [*ROWS[1:], [-1.0, 9, None]]},
    "no row": {"input_token_logprobs": []},
    "ids of another text": {"input_token_logprobs": rows_with(1, [-0.5, 9, None])},
    "a null inside": {"input_token_logprobs": rows_with(2, [None, 0, None])},
    "NaN": {"input_token_logprobs": rows_with(2, [float("nan"), 0, None])},
    "minus infinity": {"input_token_logprobs": rows_with(2, [float("-inf"), 0, None])},
    "a positive log-prob": {"input_token_logprobs": rows_with(2, [0.5, 0, None])},
    "a first row with a value": {"input_token_logprobs": rows_with(0, [-1.0, 7, None])},
    "cached beyond the start": {"cached_tokens": 3},
    "another prompt length": {"prompt_tokens": 5},
    "an aborted request": {"finish_reason": {"type": "abort"}},
    "malformed rows": {"input_token_logprobs": [1, 2]},
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
async def test_a_bad_reply_is_refused(fault: dict) -> None:
    reply = good_reply()
    reply["meta_info"] |= fault
    with pytest.raises(ScoringError):
        await score(FakeClient(reply), PROMPT, RESPONSE, VOCAB)


@pytest.mark.parametrize("missing", ["input_token_logprobs", "cached_tokens", "prompt_tokens", "finish_reason"])
async def test_a_reply_without_a_field_is_refused(missing: str) -> None:
    reply = good_reply()
    del reply["meta_info"][missing]
    with pytest.raises(ScoringError, match="malformed"):
        await score(FakeClient(reply), PROMPT, RESPONSE, VOCAB)


@pytest.mark.parametrize("response", [[512], [-1], []])
async def test_an_id_outside_the_vocabulary_never_reaches_the_server(response: list[int]) -> None:
    client = FakeClient()
    with pytest.raises(ScoringError):
        await score(client, PROMPT, np.array(response, np.int64), VOCAB)
    assert client.requests == []


def verified() -> Verified:
    prompt = Prompt("p7", "math", "?", tuple(PROMPT.tolist()), "1")
    rollout = Rollout(prompt, 0, RESPONSE, np.zeros(3, np.float32), np.zeros(3, np.int64), "stop", "")
    return Verified(rollout, Outcome.CORRECT, "equal")


async def test_a_broken_answer_becomes_a_typed_drop_with_its_reason() -> None:
    reply = good_reply()
    reply["meta_info"]["prompt_tokens"] = 5
    pool = TeacherPool([Teacher("math", FakeClient(reply), VOCAB)], attempts=3)
    result = await pool.score(verified())
    assert isinstance(result, Dropped) and (result.prompt_id, result.stage) == ("p7", "score")
    assert "prompt length" in result.reason


async def test_a_passing_failure_is_tried_again() -> None:
    client = FakeClient(TransientError("503"), good_reply())
    result = await TeacherPool([Teacher("math", client, VOCAB)], attempts=2).score(verified())
    assert isinstance(result, Scored) and result.teacher == "math"
    assert len(client.requests) == 2


async def test_a_lasting_failure_is_a_drop_after_the_last_attempt() -> None:
    client = FakeClient(TransientError("503"), TransientError("503"))
    result = await TeacherPool([Teacher("math", client, VOCAB)], attempts=2).score(verified())
    assert isinstance(result, Dropped) and len(client.requests) == 2


def test_rows_become_arrays() -> None:
    logprobs, ids = split_rows(ROWS)
    assert np.isnan(logprobs[0]) and logprobs[1:].tolist() == [-0.5, -1.5, -0.25] and ids.tolist() == [7, 8, 0, 2]
    assert [len(part) for part in split_rows([])] == [0, 0]
