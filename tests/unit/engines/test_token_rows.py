"""Token rows are what json.loads would read, and what is malformed is told."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.engines.token_rows import FIELDS, TokenRows, parse_answer, split_rows

row = st.tuples(st.one_of(st.none(), st.floats(-1e30, 1e30)), st.integers(0, 2**40), st.none())
rows = st.lists(row, min_size=1, max_size=20)
texts = st.text(max_size=30) | st.just('"output_token_logprobs":[[1,2,null]]')
replies = st.lists(
    st.fixed_dictionaries(
        {
            "text": texts,
            "output_ids": st.lists(st.integers(0, 9)),
            "meta_info": st.dictionaries(st.sampled_from(FIELDS), rows),
        }
    ),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(replies, st.booleans(), st.booleans())
def test_an_answer_is_what_json_reads(replies: list, single: bool, spaced: bool) -> None:
    answer = replies[0] if single else replies
    body = json.dumps(answer, separators=None if spaced else (",", ":")).encode()
    found = parse_answer(body)
    assert isinstance(found, dict) == single
    for reply, plain in zip([found] if single else found, [answer] if single else answer, strict=True):
        assert reply["text"] == plain["text"] and list(reply["output_ids"]) == plain["output_ids"]
        for name, expected in plain["meta_info"].items():
            assert isinstance(reply["meta_info"][name], list if spaced else TokenRows)
            logprobs, ids = split_rows(reply["meta_info"][name])
            slow = [np.nan if logprob is None else logprob for logprob, _, _ in expected]
            np.testing.assert_array_equal(logprobs, np.array(slow, np.float64).astype(np.float32))
            assert ids.tolist() == [one for _, one, _ in expected] and len(reply["meta_info"][name]) == len(expected)
            assert logprobs.dtype == np.float32 and ids.dtype == np.int64


def test_empty_rows_and_other_answers_are_left_to_json() -> None:
    assert parse_answer(b'{"meta_info":{"output_token_logprobs":[]}}')["meta_info"]["output_token_logprobs"] == []
    assert parse_answer(b'{"success":true}') == {"success": True} and parse_answer(b"[1,2]") == [1, 2]


@pytest.mark.parametrize(
    "rows",
    [
        "[[-0.5,8,null],[-0.5,9]]",
        "[[-0.5,8,null,1]]",
        "[[-0.5,null,null]]",
        '[[-0.5,"x",null]]',
        "[[-0.5,1.5,null]]",
        "[[-0.5,8,null]",
        "[[-0.5x,8,null]]",
        '[["-0.5",8,null]]',
        "[[]]",
        "[[-0.5,8,null],7]]",
        "0",
        "-1",
    ],
)
def test_malformed_rows_are_an_error(rows: str) -> None:
    with pytest.raises(ValueError):
        parse_answer(b'{"meta_info":{"output_token_logprobs":' + rows.encode() + b"}}")


@pytest.mark.parametrize("ids", [[8, 151935], [8, 9], [8], [8, 151935, 1]])
def test_the_ids_of_a_response_are_its_own_whatever_its_rows_say(ids: list[int]) -> None:
    answer = {"output_ids": ids, "meta_info": {"output_token_logprobs": [[-0.5, 8, None], [-1.5, 151935, None]]}}
    found = parse_answer(json.dumps(answer, separators=(",", ":")).encode())
    assert list(found["output_ids"]) == ids
    assert isinstance(found["output_ids"], np.ndarray) == (ids == [8, 151935])


@pytest.mark.parametrize("body", [b'{"output_ids":3,"meta_info":{}}', b'{"meta_info":{"output_token_logprobs":0}}'])
def test_a_number_in_the_place_of_rows_or_ids_is_an_error(body: bytes) -> None:
    with pytest.raises(ValueError, match="is a number"):
        parse_answer(body)
