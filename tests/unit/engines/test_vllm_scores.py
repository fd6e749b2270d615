"""vLLM's rows become the same arrays as SGLang's; every broken answer is refused by its own kind."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable

import numpy as np
import pytest

from megatron_opd.engines import vllm_scores
from megatron_opd.engines.scores import Served
from megatron_opd.teachers.scoring import Scores, ScoringError, score, score_request

PROMPT, RESPONSE, VOCAB = np.array([5, 6, 7]), np.array([8, 511, 2]), 512
SERVED = Served("/m/teacher", None, 4096, reply_model="teacher")


def entry(logprob: float, rank: int) -> dict:
    return {"logprob": logprob, "rank": rank, "decoded_token": "x"}


ROWS = [
    None,
    {"6": entry(-2.0, 9)},
    {"7": entry(-3.0, 9)},
    {"8": entry(-0.5, 1), "20": entry(-1.5, 2)},
    {"511": entry(-1.5, 2), "100": entry(-0.625, 1)},  # the order of entries says nothing
    {"2": entry(-4.5, 30), "0": entry(-0.25, 1), "21": entry(-2.0, 2)},  # the token is not among the likeliest
]


def reply() -> dict:
    choice = {"finish_reason": "length", "prompt_logprobs": ROWS, "prompt_token_ids": [5, 6, 7, 8, 511, 2]}
    usage = {"prompt_tokens": 6, "prompt_tokens_details": {"cached_tokens": 2}}
    return copy.deepcopy({"model": "teacher", "choices": [choice], "usage": usage})


class Client:
    """A vLLM that gives one answer, as it comes out of JSON."""

    url = "http://fake"
    read_scores = staticmethod(vllm_scores.read_scores)

    def __init__(self, answer: object) -> None:
        self.answer = json.loads(json.dumps(answer))

    async def prompt_logprobs(self, token_ids: list[int], start: int, top_k: int = 0, images: tuple = ()) -> dict:
        return self.answer


async def ask(answer: object, top_k: int = 0) -> Scores:
    return await score(Client(answer), score_request(PROMPT, RESPONSE, VOCAB, top_k), SERVED)


async def test_a_good_answer_gives_log_probs_rows_and_its_account() -> None:
    scores = await ask(reply(), top_k=2)
    assert scores.logprobs.dtype == np.float32 and scores.logprobs.tolist() == [-0.5, -1.5, -4.5]
    assert scores.top.ids.tolist() == [[8, 20], [100, 511], [0, 21]] and scores.top.ids.dtype == np.int64
    assert scores.top.logprobs.tolist() == [[-0.5, -1.5], [-0.625, -1.5], [-0.25, -2.0]]
    assert scores.prefilled == 4
    assert (await ask(reply())).top is None


async def test_a_server_that_does_not_tell_what_it_cached_counts_as_having_computed_all() -> None:
    answer = reply()
    answer["usage"]["prompt_tokens_details"] = None
    assert (await ask(answer)).prefilled == 6


def choice(**changes: object) -> Callable[[dict], None]:
    return lambda answer: answer["choices"][0].update(changes)


def row(index: int, value: object) -> Callable[[dict], None]:
    return lambda answer: answer["choices"][0]["prompt_logprobs"].__setitem__(index, value)


def other(**changes: object) -> Callable[[dict], None]:
    return lambda answer: answer.update(changes)


FAULTS = {
    "a row short": (choice(prompt_logprobs=ROWS[:-1]), "count"),
    "shifted": (choice(prompt_logprobs=[None, *ROWS[2:], ROWS[3]]), "ids"),
    "shifted to the left": (choice(prompt_logprobs=[*ROWS[1:], ROWS[3]]), "first_row"),
    "echoed ids of another text": (choice(prompt_token_ids=[5, 6, 7, 8, 9, 2]), "ids"),
    "a row twice": (row(4, ROWS[3]), "ids"),
    "a null in the middle": (row(4, None), "malformed"),
    "a null for a log-prob": (row(4, {"511": {"logprob": None, "rank": 1}}), "not_finite"),
    "NaN": (row(4, {"511": entry(float("nan"), 1)}), "not_finite"),
    "minus infinity, as vLLM writes it": (row(4, {"511": entry(-9999.0, 1)}), "not_finite"),
    "a positive log-prob": (row(4, {"511": entry(0.5, 1)}), "positive"),
    "an aborted request": (choice(finish_reason="abort"), "finish"),
    "another prompt length": (other(usage={"prompt_tokens": 5, "prompt_tokens_details": None}), "prompt_length"),
    "cached beyond the start": (
        other(usage={"prompt_tokens": 6, "prompt_tokens_details": {"cached_tokens": 5}}),
        "cached",
    ),
    "another model": (other(model="student"), "model"),
    "no choice": (other(choices=[]), "malformed"),
    "two choices": (other(choices=[{}, {}]), "malformed"),
    "no account": (other(usage=None), "malformed"),
}


@pytest.mark.parametrize(("fault", "kind"), FAULTS.values(), ids=FAULTS.keys())
async def test_a_bad_answer_is_refused(fault: Callable[[dict], None], kind: str) -> None:
    answer = reply()
    fault(answer)
    with pytest.raises(ScoringError) as caught:
        await ask(answer)
    assert caught.value.kind == kind


@pytest.mark.parametrize(
    "rows",
    [
        {"511": entry(-1.5, 2)},  # rank 1 lacks
        {"511": entry(-1.5, 1), "100": entry(-0.625, 1)},
        {"511": entry(-1.5, 1), "100": entry(-0.625, 2)},  # the second is likelier than the first
        {"511": entry(-1.5, 2), "100": entry(-0.625, 1), "101": entry(-0.7, 2)},
        {"511": entry(-1.5, 1), "100": entry(-9999.0, 2)},
        {"511": entry(-1.5, 1), "512": entry(-2.5, 2)},  # outside the vocabulary
    ],
)
async def test_rows_that_cannot_be_right_are_refused(rows: dict) -> None:
    answer = reply()
    row(4, rows)(answer)
    with pytest.raises(ScoringError) as caught:
        await ask(answer, top_k=2)
    assert caught.value.kind == "top_k"
