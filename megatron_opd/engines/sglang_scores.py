"""SGLang's answer to a scoring request: ``input_token_logprobs`` of ``/generate``."""

from __future__ import annotations

from operator import index

import numpy as np

from megatron_opd.engines.scores import PromptScores, Require, ScoreRequest
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.engines.top_rows import rows_from_base64

ROW_BYTES = 64  # longest "[-12.345678710937500, 151935, null], " and its share of the rest
ENTRY_BYTES = 16  # of a most likely token: two numbers of 4 bytes, in base64
REST_BYTES = 1 << 16


def longest_answer(rows: int, top_k: int) -> int:
    """Most bytes of an honest answer about ``rows`` positions."""
    return REST_BYTES + rows * (ROW_BYTES + ENTRY_BYTES * top_k)


def read_scores(reply: dict, request: ScoreRequest, require: Require) -> PromptScores:
    """One row for each position from ``request.start`` on, the first without a log-prob: nothing asked predicts it."""
    meta, start = reply["meta_info"], request.start
    rows, asked = meta["input_token_logprobs"], request.token_ids[start:]
    logprobs, echoed = split_rows(rows)
    require(len(rows) == len(asked), "count", "number of rows", len(rows), len(asked))
    require(bool(np.isnan(logprobs[0])), "first_row", "first row", logprobs[0], "null: nothing predicts it")
    # SGLang echoes an id as 0 when it is the vocabulary's last one or lies in its padding.
    same = (echoed == asked) | ((asked >= request.vocab_size - 1) & (echoed == 0))
    require(bool(same.all()), "ids", "echoed ids", echoed[~same][:4], asked[~same][:4])
    top = None
    if request.top_k:
        top = rows_from_base64(meta, len(asked) - 1, request.top_k, lambda ok, *told: require(ok, "top_k", *told))
    return PromptScores(
        logprobs=logprobs[1:],
        top=top,
        prompt_tokens=index(meta["prompt_tokens"]),
        cached_tokens=index(meta["cached_tokens"]),
        finish_reason=meta["finish_reason"]["type"],
        model=None,
        weight_version=meta.get("weight_version"),
        image_tokens=meta.get("image_tokens"),
    )
