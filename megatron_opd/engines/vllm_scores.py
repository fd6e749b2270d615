"""vLLM's answer to a scoring request: ``prompt_logprobs`` of ``/v1/completions``.

A list with one entry for each token from the very first on, each a dictionary from token id, as text, to
``{"logprob", "rank", "decoded_token"}``: the token itself, and the K most likely ones when they are asked for. There is
no compact form and no first position, so an answer is 75 bytes and one dictionary look-up for each of P + R tokens, and
as much again for each of K rows (docs/teachers.md has the times).
"""

from __future__ import annotations

from operator import index

import numpy as np

from megatron_opd.engines.scores import PromptScores, Require, ScoreRequest
from megatron_opd.records import TopRows

ENTRY_BYTES = 512  # one token of one position: mostly below 80, but a decoded token may be long, and escaped
REST_BYTES = 1 << 16


def longest_answer(tokens: int, top_k: int) -> int:
    """Most bytes of an honest answer about a text of ``tokens``."""
    return REST_BYTES + tokens * ENTRY_BYTES * (1 + top_k)


def read_scores(reply: dict, request: ScoreRequest, require: Require) -> PromptScores:
    """The response's part of an answer about prompt and response."""
    (choice,) = reply["choices"]
    usage, rows, asked = reply["usage"], choice["prompt_logprobs"], request.token_ids
    require(len(rows) == len(asked), "count", "number of rows", len(rows), len(asked))
    require(rows[0] is None, "first_row", "first row", rows[0], "null: nothing predicts it")
    echoed = np.array(choice["prompt_token_ids"], dtype=np.int64)
    require(np.array_equal(echoed, asked), "ids", "echoed ids", echoed[:4], asked[:4])
    rows, keys = rows[request.prompt_length :], [str(token) for token in request.response_ids.tolist()]
    lacking = [key for row, key in zip(rows, keys, strict=True) if key not in row][:4]
    require(not lacking, "ids", "rows", f"none for the tokens {lacking}", "a log-prob of each token")
    logprobs = [row[key]["logprob"] for row, key in zip(rows, keys, strict=True)]
    details = usage["prompt_tokens_details"]
    return PromptScores(
        logprobs=np.array(logprobs, dtype=np.float32),  # null becomes NaN
        top=_top_rows(rows, request.top_k, require) if request.top_k else None,
        prompt_tokens=index(usage["prompt_tokens"]),
        cached_tokens=None if details is None else index(details["cached_tokens"]),
        finish_reason=choice["finish_reason"],
        model=reply["model"],
        weight_version=None,
    )


def _top_rows(rows: list[dict], k: int, require: Require) -> TopRows:
    """The entries of rank 1 to K, [R, K]; the token itself comes beside them where its rank is higher."""
    entries = [(int(key), entry["logprob"], entry["rank"]) for row in rows for key, entry in row.items()]
    table = np.array(entries, dtype=np.float64)  # ids and ranks are whole numbers far below 2**53
    inside = table[:, 2] <= k
    ranks = table[inside, 2].reshape(-1, k) if inside.sum() == len(rows) * k else None
    fits = ranks is not None and bool((np.sort(ranks, axis=1) == np.arange(1, k + 1)).all())
    require(fits, "top_k", "ranks", "others", f"1 to {k} once in each row")
    order = np.argsort(ranks, axis=1)
    ids, values = (np.take_along_axis(table[inside, column].reshape(-1, k), order, axis=1) for column in (0, 1))
    return TopRows(ids=ids.astype(np.int64), logprobs=values.astype(np.float32))
