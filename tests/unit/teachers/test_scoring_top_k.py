"""The scoring contract of top-k rows: good ones are taken to the bit, every bad one is refused with a clear reason."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from fake_scorer import (
    IDS,
    PROMPT,
    RESPONSE,
    SAMPLED,
    VALUES,
    VOCAB,
    FakeScorer,
    K,
    encode,
    reply_with_rows,
    rows_with,
)

from megatron_opd.teachers.scoring import Scores, ScoringError, UnfitRequest, score, score_request


async def ask(answer: dict, top_k: int = K) -> Scores:
    return await score(FakeScorer(answer), score_request(PROMPT, RESPONSE, VOCAB, top_k))


async def test_good_rows_are_taken_to_the_bit_and_asked_for_with_the_log_probs() -> None:
    client = FakeScorer(reply_with_rows())
    scores = await score(client, score_request(PROMPT, RESPONSE, VOCAB, K))
    assert client.requests == [([5, 6, 7, 8, 511, 2], 2, K)]
    assert scores.logprobs.tolist() == SAMPLED
    assert scores.top.ids.dtype == np.int64 and (scores.top.ids == IDS).all()
    assert scores.top.logprobs.dtype == np.float32 and (scores.top.logprobs == VALUES).all()
    assert scores.top.ids.flags.writeable and scores.top.logprobs.flags.writeable  # torch warns about others


async def test_float_rounding_is_tolerated() -> None:
    values = np.array([[5e-4, -9.0, -9.5], [-0.625, -1.50005, -2.5], [-0.25, -2.0, -4.0]])
    scores = await ask(reply_with_rows(values=values, input_token_logprobs=rows_with(1, [5e-4, 8, None])))
    assert (scores.top.logprobs == values.astype(np.float32)).all()


async def test_one_token_at_each_position() -> None:
    scores = await ask(reply_with_rows(IDS[:, :1], VALUES[:, :1]), top_k=1)
    assert scores.top.ids.tolist() == [[8], [100], [0]]


def changed(array: np.ndarray, place: tuple[int, int], value: float) -> np.ndarray:
    other = array.copy()
    other[place] = value
    return other


WRONG_ROWS = {
    "an id above the vocabulary": (changed(IDS, (0, 2), 512), VALUES, r"top-k ids[\s\S]*512[\s\S]*0..511"),
    "a negative id": (changed(IDS, (0, 2), -1), VALUES, "top-k ids"),
    "an id twice in a row": (changed(IDS, (1, 2), 100), VALUES, "twice in a row"),
    "NaN": (IDS, changed(VALUES, (2, 1), np.nan), "not finite"),
    "minus infinity": (IDS, changed(VALUES, (2, 2), -np.inf), "not finite"),
    "a positive log-prob": (IDS, changed(VALUES, (2, 0), 0.25), "at most 0"),
    "rows that rise": (IDS[:, ::-1], VALUES[:, ::-1], "largest first"),
    "two entries exchanged": (IDS, VALUES[:, [0, 2, 1]], "largest first"),
    "probabilities of more than 1": (IDS, changed(VALUES, (2, 1), -0.25), "sum of top-k probabilities"),
    "another log-prob of the sampled token": (IDS, changed(VALUES, (0, 0), -0.5002), "beside its top-k row"),
    "rows of the position before": (np.roll(IDS, 1, axis=0), np.roll(VALUES, 1, axis=0), "beside its top-k row"),
    "ids of other rows": (IDS[[1, 0, 2]], VALUES, "beside its top-k row"),
    "a row short": (IDS[:2], VALUES[:2], r"shape[\s\S]*\[2, 3\][\s\S]*\[3, 3\]"),
    "a row more": (np.tile(IDS, (2, 1))[:4], np.tile(VALUES, (2, 1))[:4], "shape"),
    "fewer tokens than asked for": (IDS[:, :2], VALUES[:, :2], "shape"),
    "more tokens than asked for": (np.c_[IDS, [1, 1, 1]], np.c_[VALUES, [-9, -9, -9]], "shape"),
    "no rows": (IDS[:0], VALUES[:0], "shape"),
}


@pytest.mark.parametrize("fault", WRONG_ROWS.values(), ids=WRONG_ROWS.keys())
async def test_rows_that_cannot_be_right_are_refused(fault: tuple[np.ndarray, np.ndarray, str]) -> None:
    ids, values, reason = fault
    with pytest.raises(ScoringError) as caught:
        await ask(reply_with_rows(ids, values))
    assert caught.match(reason) and "http://fake" in str(caught.value)


async def test_a_token_outside_its_row_cannot_be_likelier_than_the_last_inside() -> None:
    with pytest.raises(ScoringError, match="beside its top-k row"):
        await ask(reply_with_rows(input_token_logprobs=rows_with(3, [-3.5, 2, None])))


async def test_rows_and_log_probs_are_checked_each_against_the_other() -> None:
    with pytest.raises(ScoringError, match="beside its top-k row"):
        await ask(reply_with_rows(input_token_logprobs=rows_with(2, [-1.6, 0, None])))


VALUES_KEY, IDS_KEY = "input_top_logprobs_val_flat_b64", "input_top_logprobs_idx_flat_b64"
WRONG_WIRE = {
    "truncated values": ({VALUES_KEY: encode(VALUES, "<f4")[:-4]}, "number of bytes"),
    "truncated ids": ({IDS_KEY: encode(IDS, "<i4")[:-8]}, "number of bytes"),
    "cut inside a base64 group": ({VALUES_KEY: encode(VALUES, "<f4")[:-3]}, "malformed"),
    "bytes too many": ({IDS_KEY: encode(np.r_[IDS, IDS], "<i4")}, "number of bytes"),
    "no base64": ({VALUES_KEY: "?" * 48}, "malformed"),
    "a list instead of base64": ({VALUES_KEY: VALUES.ravel().tolist()}, "malformed"),
    "values of another dtype": ({VALUES_KEY: encode(VALUES, "<f8"), f"{VALUES_KEY}_dtype": "float64"}, "dtype"),
    "values in half precision": ({VALUES_KEY: encode(VALUES, "<f2"), f"{VALUES_KEY}_dtype": "float16"}, "dtype"),
    "ids of another dtype": ({IDS_KEY: encode(IDS, "<i8"), f"{IDS_KEY}_dtype": "int64"}, "dtype"),
    "a dtype that does not tell": ({IDS_KEY: encode(IDS, "<i8")}, "number of bytes"),
    "another shape of as many numbers": ({"input_top_logprobs_shape": [9, 1]}, "shape"),
    "a flat shape": ({"input_top_logprobs_shape": [9]}, "shape"),
    "no null prefix": ({"input_top_logprobs_null_prefix": 0}, "null prefix"),
    "a longer null prefix": ({"input_top_logprobs_null_prefix": 2}, "null prefix"),
}


@pytest.mark.parametrize("fault", WRONG_WIRE.values(), ids=WRONG_WIRE.keys())
async def test_a_broken_encoding_is_refused(fault: tuple[dict, str]) -> None:
    changes, reason = fault
    with pytest.raises(ScoringError, match=reason):
        await ask(reply_with_rows(**changes))


@pytest.mark.parametrize("field", [key for key in reply_with_rows()["meta_info"] if "top" in key])
async def test_a_reply_without_a_field_is_refused(field: str) -> None:
    with pytest.raises(ScoringError, match="malformed"):
        await ask(reply_with_rows(**{field: ...}))


@pytest.mark.parametrize("mangle", [lambda text: "A" * len(text), lambda text: text[::-1].replace("=", "A")])
async def test_bytes_that_decode_to_something_else_never_become_a_number(mangle: Callable[[str], str]) -> None:
    good = reply_with_rows()["meta_info"]
    for key in (VALUES_KEY, IDS_KEY):
        with pytest.raises(ScoringError):
            await ask(reply_with_rows(**{key: mangle(good[key])}))


@pytest.mark.parametrize("top_k", [VOCAB + 1, -1])
def test_more_tokens_than_the_vocabulary_has_are_never_asked_for(top_k: int) -> None:
    with pytest.raises(UnfitRequest, match="top_k"):
        score_request(PROMPT, RESPONSE, VOCAB, top_k)
