"""The scoring contract: what a teacher's answer must satisfy before one of its numbers is used.

A request asks for the response only (``start = P - 1``), so the prompt can come from the prefix cache. The answer has
one row for each position from ``start`` on; the first has no log-prob, because nothing asked predicts it. Count, echoed
ids, finiteness, sign, prompt length and cache use are all checked, and so is what must hold of the K most likely tokens
(``engines.top_rows``): a server that shifts, shortens or mixes up its answers would otherwise train the student on
noise without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.engines.top_rows import LARGEST_LOGPROB, Check, check_rows, rows_from_base64
from megatron_opd.errors import EngineError
from megatron_opd.records import TopRows


class ScoringError(EngineError):
    """A teacher's answer breaks the contract: its rollout is dropped and counted."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a teacher says of a response of R tokens, at temperature 1."""

    logprobs: np.ndarray  # [R] float32, of the response's tokens
    top: TopRows | None  # the most likely tokens in their places; None when not asked for


async def score(
    client: SGLangClient, prompt_ids: np.ndarray, response_ids: np.ndarray, vocab_size: int, top_k: int
) -> Scores:
    """The response under the teacher behind ``client``, with its ``top_k`` most likely tokens; 0 asks for none.

    Raises ScoringError when the answer breaks the contract, EngineError or TransientError when there is none.
    """
    check = _checker(client)
    prompt_length, length = len(prompt_ids), len(response_ids)
    token_ids = np.concatenate([prompt_ids, response_ids])
    check(prompt_length > 0 and length > 0, "request", (prompt_length, length), "a prompt and a response")
    # One id outside the vocabulary ends the whole server, as does a larger top_k: neither must leave this process.
    largest = int(token_ids.max())
    check(0 <= int(token_ids.min()) and largest < vocab_size, "token id", largest, f"0..{vocab_size - 1}")
    check(0 <= top_k <= vocab_size, "top_k", top_k, f"at most {vocab_size}, the size of its vocabulary")
    reply = await client.prompt_logprobs(token_ids.tolist(), start=prompt_length - 1, top_k=top_k)
    try:
        meta = reply["meta_info"]
        logprobs = _logprobs(meta, token_ids, prompt_length, vocab_size, check)
        top = _top_rows(meta, response_ids, logprobs, vocab_size, top_k, check) if top_k else None
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ScoringError("A teacher's answer is malformed", where=client.url, got=repr(error)) from error
    return Scores(logprobs, top)


def _logprobs(meta: dict, token_ids: np.ndarray, prompt_length: int, vocab_size: int, check: Check) -> np.ndarray:
    """The response's log-probs [R]."""
    rows, prompt_tokens, cached = meta["input_token_logprobs"], meta["prompt_tokens"], meta["cached_tokens"]
    logprobs, echoed = split_rows(rows)
    finish, start = meta["finish_reason"]["type"], prompt_length - 1
    check(finish == "length", "finish reason", finish, "length")
    check(prompt_tokens == len(token_ids), "prompt length", prompt_tokens, len(token_ids))
    check(cached <= start, "cached tokens", cached, f"at most {start}, or rows would be missing")
    check(len(rows) == len(token_ids) - start, "number of rows", len(rows), len(token_ids) - start)
    check(bool(np.isnan(logprobs[0])), "first row", logprobs[0], "null: nothing predicts it")
    # SGLang echoes an id as 0 when it is the vocabulary's last one or lies in its padding.
    asked = token_ids[start:]
    same = (echoed == asked) | ((asked >= vocab_size - 1) & (echoed == 0))
    check(bool(same.all()), "echoed ids", echoed[~same][:4], asked[~same][:4])
    values = logprobs[1:]
    check(bool(np.isfinite(values).all()), "log-probs", "a value that is not finite", "finite values")
    check(bool((values <= LARGEST_LOGPROB).all()), "log-probs", values.max(), "at most 0")
    return values


def _top_rows(
    meta: dict, response_ids: np.ndarray, logprobs: np.ndarray, vocab_size: int, top_k: int, check: Check
) -> TopRows:
    """The most likely tokens in the place of each of the response's, [R, K]."""
    top = rows_from_base64(meta, len(response_ids), top_k, check)
    largest = int(top.ids.max())
    check(largest < vocab_size, "top-k ids", largest, f"0..{vocab_size - 1}")
    check_rows(top, response_ids, logprobs, check)
    return top


def _checker(client: SGLangClient) -> Check:
    def check(ok: bool, what: str, got: object, expected: object) -> None:
        if not ok:
            raise ScoringError(f"A teacher's {what} is wrong", where=client.url, got=got, expected=expected)

    return check
