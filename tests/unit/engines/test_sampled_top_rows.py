"""The student's top-k rows at sampling: good ones become ids, bad ones an error of the rollout engine."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from pools import pool_of

from megatron_opd.engines.rollout import RolloutEngine
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.errors import EngineError
from megatron_opd.records import Prompt, Rollout

K = 2
ROWS = [  # of the tokens 8, 9 and 2; the second one is not in its row
    [[-0.5, 8, None], [-2.0, 30, None]],
    [[-0.25, 0, None], [-3.0, 31, None]],
    [[-0.5, 7, None], [-1.0, 2, None]],
]
META = {
    "finish_reason": {"type": "stop", "matched": 2},
    "output_token_logprobs": [[-0.5, 8, None], [-4.0, 9, None], [-1.0, 2, None]],
    "output_top_logprobs": ROWS,
    "weight_versions": [{"version": "4", "start": 0, "end": 3}],
}
PROMPT = Prompt("p", "math", "?", (5, 6), "1")


class FakeTokenizer:
    eos_token_id = 2

    def decode(self, token_ids: list[int], **_: object) -> str:
        return " ".join(map(str, token_ids))


@pytest.fixture
def fake(fake):
    """The fake server with a good answer, to be spoilt by the test."""
    server, _ = fake
    server.answer = {"output_ids": [8, 9, 2], "meta_info": copy.deepcopy(META)}
    return fake


async def sample(client: SGLangClient, top_ids: int = K) -> Rollout:
    (rollout,) = await RolloutEngine(pool_of(client), FakeTokenizer(), 1, top_ids).sample_group(PROMPT, 0, 1, 8)
    return rollout


async def test_good_rows_become_the_ids_of_the_rollout(fake) -> None:
    server, client = fake
    rollout = await sample(client)
    assert rollout.top_ids.dtype == np.int64 and rollout.top_ids.tolist() == [[8, 30], [0, 31], [7, 2]]
    assert rollout.token_ids.tolist() == [8, 9, 2] and server.posts[0][1]["top_logprobs_num"] == K


async def test_none_are_asked_for_or_kept_at_zero(fake) -> None:
    server, client = fake
    rollout = await sample(client, top_ids=0)
    assert rollout.top_ids is None and "top_logprobs_num" not in server.posts[0][1]


def with_row(index: int, row: object) -> list:
    return [row if i == index else old for i, old in enumerate(copy.deepcopy(ROWS))]


BAD = {
    "a row short": (ROWS[:2], "shape"),
    "a row more": ([*ROWS, ROWS[0]], "shape"),
    "no rows": ([], "shape"),
    "fewer tokens than asked for": ([row[:1] for row in ROWS], "shape"),
    "more tokens than asked for": ([[*row, [-9.0, 40, None]] for row in ROWS], "shape"),
    "rows of unequal length": (with_row(1, ROWS[1][:1]), "malformed"),
    "a null instead of a row": (with_row(1, None), "malformed"),
    "null instead of rows": (None, "shape"),
    "rows of another kind": (with_row(1, [[-0.5, "eight", None], [-2.0, 30, None]]), "malformed"),
    "a null log-prob": (with_row(1, [[None, 0, None], [-3.0, 31, None]]), "not finite"),
    "NaN": (with_row(1, [[-0.25, 0, None], [float("nan"), 31, None]]), "not finite"),
    "minus infinity": (with_row(1, [[-0.25, 0, None], [float("-inf"), 31, None]]), "not finite"),
    "a positive log-prob": (with_row(1, [[0.25, 0, None], [-3.0, 31, None]]), "at most 0"),
    "a row that rises": (with_row(2, ROWS[2][::-1]), "largest first"),
    "probabilities of more than 1": (with_row(1, [[-0.25, 0, None], [-0.25, 31, None]]), "sum of top-k"),
    "an id twice in a row": (with_row(1, [[-0.25, 0, None], [-3.0, 0, None]]), "twice in a row"),
    "a negative id": (with_row(1, [[-0.25, -1, None], [-3.0, 31, None]]), "0 or more"),
    "a null id": (with_row(1, [[-0.25, None, None], [-3.0, 31, None]]), "whole number"),
    "a broken id": (with_row(1, [[-0.25, 0.5, None], [-3.0, 31, None]]), "whole number"),
    "an id that no integer holds": (with_row(1, [[-0.25, 2**70, None], [-3.0, 31, None]]), "whole number"),
    "another log-prob of the token": (with_row(0, [[-0.5002, 8, None], [-2.0, 30, None]]), "beside its top-k row"),
    "less likely than the token": (with_row(1, [[-0.25, 0, None], [-4.5, 31, None]]), "beside its top-k row"),
    "rows of the position before": ([ROWS[2], *ROWS[:2]], "beside its top-k row"),
}


@pytest.mark.parametrize("fault", BAD.values(), ids=BAD.keys())
async def test_bad_rows_are_an_error(fake, fault: tuple[object, str]) -> None:
    server, client = fake
    rows, reason = fault
    server.answer["meta_info"]["output_top_logprobs"] = rows
    with pytest.raises(EngineError, match=reason) as caught:
        await sample(client)
    assert client.url in str(caught.value)


async def test_an_answer_without_rows_is_an_error(fake) -> None:
    server, client = fake
    del server.answer["meta_info"]["output_top_logprobs"]
    with pytest.raises(EngineError, match="malformed"):
        await sample(client)
