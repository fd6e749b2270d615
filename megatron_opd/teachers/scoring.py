"""The scoring contract: what a teacher's answer must satisfy before one of its numbers is used.

A request asks for the response only (``start = P - 1``), so the prompt can come from the prefix cache. The answer has
one row for each position from ``start`` on; the first has no log-prob, because nothing asked predicts it. Count, echoed
ids, finiteness, sign, prompt length and cache use are all checked: a server that shifts, shortens or mixes up its
answers would otherwise train the student on noise without a word.
"""

from __future__ import annotations

import numpy as np

from megatron_opd.engines.sglang import SGLangClient, split_rows
from megatron_opd.errors import EngineError

LARGEST_LOGPROB = 1e-3  # a log-prob is at most 0; float arithmetic may exceed it a little


class ScoringError(EngineError):
    """A teacher's answer breaks the contract: its rollout is dropped and counted."""


async def score(client: SGLangClient, prompt_ids: np.ndarray, response_ids: np.ndarray, vocab_size: int) -> np.ndarray:
    """Log-prob of each response token under the teacher behind ``client``: [R] float32, temperature 1.

    Raises ScoringError when the answer breaks the contract, EngineError or TransientError when there is none.
    """
    prompt_length, length = len(prompt_ids), len(response_ids)
    token_ids = np.concatenate([prompt_ids, response_ids])
    _check(client, prompt_length > 0 and length > 0, "request", (prompt_length, length), "a prompt and a response")
    # One id outside the vocabulary ends the whole server, so it must not leave this process.
    largest = int(token_ids.max())
    _check(client, 0 <= int(token_ids.min()) and largest < vocab_size, "token id", largest, f"0..{vocab_size - 1}")
    reply = await client.prompt_logprobs(token_ids.tolist(), start=prompt_length - 1)
    return check_reply(client, reply, token_ids, prompt_length, vocab_size)


def check_reply(
    client: SGLangClient, reply: dict, token_ids: np.ndarray, prompt_length: int, vocab_size: int
) -> np.ndarray:
    """The response's log-probs of a reply that satisfies the contract. Raises ScoringError."""
    try:
        meta = reply["meta_info"]
        rows, prompt_tokens, cached = meta["input_token_logprobs"], meta["prompt_tokens"], meta["cached_tokens"]
        finish = meta["finish_reason"]["type"]
        logprobs, echoed = split_rows(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise ScoringError("A teacher's answer is malformed", where=client.url, got=repr(error)) from error
    start = prompt_length - 1
    _check(client, finish == "length", "finish reason", finish, "length")
    _check(client, prompt_tokens == len(token_ids), "prompt length", prompt_tokens, len(token_ids))
    _check(client, cached <= start, "cached tokens", cached, f"at most {start}, or rows would be missing")
    _check(client, len(rows) == len(token_ids) - start, "number of rows", len(rows), len(token_ids) - start)
    _check(client, bool(np.isnan(logprobs[0])), "first row", logprobs[0], "null: nothing predicts it")
    # SGLang echoes an id as 0 when it is the vocabulary's last one or lies in its padding.
    asked = token_ids[start:]
    same = (echoed == asked) | ((asked >= vocab_size - 1) & (echoed == 0))
    _check(client, bool(same.all()), "echoed ids", echoed[~same][:4], asked[~same][:4])
    values = logprobs[1:]
    _check(client, bool(np.isfinite(values).all()), "log-probs", "a value that is not finite", "finite values")
    _check(client, bool((values <= LARGEST_LOGPROB).all()), "log-probs", values.max(), "at most 0")
    return values


def _check(client: SGLangClient, ok: bool, what: str, got: object, expected: object) -> None:
    if not ok:
        raise ScoringError(f"A teacher's {what} is wrong", where=client.url, got=got, expected=expected)
