"""The scoring contract without top-k rows: one good reply is taken to the bit, every bad one is refused."""

from __future__ import annotations

import numpy as np
import pytest
from fake_scorer import PROMPT, RESPONSE, ROWS, SAMPLED, VOCAB, FakeScorer, good_reply, rows_with

from megatron_opd.engines.scores import Served
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.teachers.scoring import Scores, ScoringError, UnfitRequest, score, score_request


async def ask(client: FakeScorer, served: Served | None = None) -> Scores:
    return await score(client, score_request(PROMPT, RESPONSE, VOCAB, 0), served)


async def test_a_good_reply_gives_the_response_log_probs_and_asks_for_nothing_else() -> None:
    client = FakeScorer(good_reply())
    scores = await ask(client)
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
        await ask(FakeScorer(good_reply(**fault)))


@pytest.mark.parametrize("fault", MALFORMED.values(), ids=MALFORMED.keys())
async def test_a_malformed_reply_is_refused(fault: dict) -> None:
    with pytest.raises(ScoringError, match="malformed"):
        await ask(FakeScorer(good_reply(**fault)))


@pytest.mark.parametrize("reply", [[], None, "busy", {"meta_info": None}])
async def test_a_reply_of_another_kind_is_refused(reply: object) -> None:
    with pytest.raises(ScoringError, match="malformed"):
        await ask(FakeScorer(reply))


@pytest.mark.parametrize("response", [[512], [-1], []])
def test_an_id_outside_the_vocabulary_never_becomes_a_request(response: list[int]) -> None:
    with pytest.raises(UnfitRequest):
        score_request(PROMPT, np.array(response, np.int64), VOCAB, 0)


def test_rows_become_arrays() -> None:
    logprobs, ids = split_rows(ROWS)
    assert np.isnan(logprobs[0]) and logprobs[1:].tolist() == SAMPLED and ids.tolist() == [7, 8, 0, 2]
    assert [len(part) for part in split_rows([])] == [0, 0]
