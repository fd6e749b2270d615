"""The scoring contract without top-k rows: one good reply is taken to the bit, every bad one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fake_scorer import PROMPT, RESPONSE, ROWS, SAMPLED, VOCAB, FakeScorer, good_reply, rows_with

from megatron_opd.engines.token_rows import split_rows
from megatron_opd.teachers.scoring import ScoringError, score


async def test_a_good_reply_gives_the_response_log_probs_and_asks_for_nothing_else() -> None:
    client = FakeScorer(good_reply())
    scores = await score(client, PROMPT, RESPONSE, VOCAB, 0)
    assert scores.logprobs.dtype == np.float32 and scores.logprobs.tolist() == SAMPLED
    assert scores.top is None and client.requests == [([5, 6, 7, 8, 511, 2], 2, 0)]


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
}
MALFORMED = {
    "rows of another kind": {"input_token_logprobs": [1, 2]},
    "an id that no integer holds": {"input_token_logprobs": rows_with(1, [-0.5, 2**70, None])},
    "a null instead of a count": {"cached_tokens": None},
    "a null instead of a finish": {"finish_reason": None},
} | {f"no {field}": {field: ...} for field in good_reply()["meta_info"]}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
async def test_a_bad_reply_is_refused(fault: dict) -> None:
    with pytest.raises(ScoringError, match="is wrong"):
        await score(FakeScorer(good_reply(**fault)), PROMPT, RESPONSE, VOCAB, 0)


@pytest.mark.parametrize("fault", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_reply_is_refused(fault: dict) -> None:
    with pytest.raises(ScoringError, match="malformed"):
        await score(FakeScorer(good_reply(**fault)), PROMPT, RESPONSE, VOCAB, 0)


@pytest.mark.parametrize("reply", [[], None, "busy", {"meta_info": None}])
async def test_a_reply_of_another_kind_is_refused(reply: object) -> None:
    with pytest.raises(ScoringError, match="malformed"):
        await score(FakeScorer(reply), PROMPT, RESPONSE, VOCAB, 0)


@pytest.mark.parametrize("response", [[512], [-1], []])
async def test_an_id_outside_the_vocabulary_never_reaches_the_server(response: list[int]) -> None:
    client = FakeScorer()
    with pytest.raises(ScoringError):
        await score(client, PROMPT, np.array(response, np.int64), VOCAB, 0)
    assert client.requests == []


def test_rows_become_arrays() -> None:
    logprobs, ids = split_rows(ROWS)
    assert np.isnan(logprobs[0]) and logprobs[1:].tolist() == SAMPLED and ids.tolist() == [7, 8, 0, 2]
    assert [len(part) for part in split_rows([])] == [0, 0]
