"""The scoring contract: what a teacher's answer must satisfy before one of its numbers is used.

A request asks for the response only (``start = P - 1``), so the prompt can come from the prefix cache. Whatever the
engine, its answer must be to this request, about these tokens, complete, finite, of probabilities, and of the model and
weights that the server had at the start; docs/teachers.md lists every check. A server that shifts, shortens or mixes up
its answers would otherwise train the student on noise without a word.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.engines.scores import PromptScores, Require, ScoreRequest, ScoringClient, Served
from megatron_opd.engines.top_rows import LARGEST_LOGPROB, SMALLEST_LOGPROB, check_rows
from megatron_opd.errors import EngineError
from megatron_opd.records import Image, TopRows
from megatron_opd.runtime.http import BadReply


class ScoringError(BadReply):
    """A teacher's answer breaks the contract: its rollout is dropped and counted."""


class UnfitRequest(EngineError):
    """What a teacher must not be asked: one id outside its vocabulary ends some servers."""


@dataclass(frozen=True, eq=False)
class Scores:
    """What a teacher says of a response of R tokens, at temperature 1."""

    logprobs: np.ndarray  # [R] float32, of the response's tokens
    top: TopRows | None  # the most likely tokens in their places; None when not asked for
    prefilled: int  # tokens of prompt and response that the server computed: all but those from its prefix cache


def score_request(
    prompt_ids: np.ndarray,
    response_ids: np.ndarray,
    vocab_size: int,
    top_k: int,
    *,
    images: tuple[Image, ...] = (),
    lacking: frozenset[int] = frozenset(),
) -> ScoreRequest:
    """A request that no server can be hurt by, and that means to the teacher what it means to the student.

    images: of the prompt; lacking: ids that are the student's alone. Raises UnfitRequest.
    """
    prompt_length, length = len(prompt_ids), len(response_ids)
    if not (prompt_length > 0 and length > 0):
        raise UnfitRequest(
            "A request lacks a part", kind="request", got=(prompt_length, length), expected="a prompt and a response"
        )
    token_ids = np.concatenate([prompt_ids, response_ids])
    smallest, largest = int(token_ids.min()), int(token_ids.max())
    if smallest < 0 or largest >= vocab_size:
        got = smallest if smallest < 0 else largest
        what = "A token id is outside the teacher's vocabulary"
        raise UnfitRequest(what, kind="vocabulary", got=got, expected=f"0..{vocab_size - 1}")
    foreign = lacking.intersection(token_ids.tolist()) if lacking else None
    if foreign:
        what = "A token is one of the student's that the teacher's tokenizer lacks"
        raise UnfitRequest(what, kind="vocabulary", got=sorted(foreign)[:4], expected="tokens that both have")
    if not 0 <= top_k <= vocab_size:
        what = "A teacher's top_k is wrong"
        raise UnfitRequest(
            what, kind="request", got=top_k, expected=f"at most {vocab_size}, the size of its vocabulary"
        )
    return ScoreRequest(token_ids, prompt_length, top_k, vocab_size, images)


async def score(client: ScoringClient, request: ScoreRequest, served: Served | None = None) -> Scores:
    """The response under the teacher behind ``client``, which must still be ``served``; None: not known yet.

    Raises ScoringError when the answer breaks the contract, EngineError or TransientError when there is none.
    """
    require = _requirement(client)
    reply = await client.prompt_logprobs(
        request.token_ids, start=request.start, top_k=request.top_k, images=request.images
    )
    try:
        found = client.read_scores(reply, request, require)
        _check_account(found, request, require)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = "A teacher's answer is malformed"
        raise ScoringError(what, kind="malformed", where=client.url, got=repr(error)) from error
    if served is not None:
        _check_identity(found, served, require)
    _check_values(found, request, require)
    return Scores(found.logprobs, found.top, len(request.token_ids) - (found.cached_tokens or 0))


def _check_account(found: PromptScores, request: ScoreRequest, require: Require) -> None:
    """What the server says of its own work."""
    length, start, cached = len(request.token_ids), request.start, found.cached_tokens
    require(found.finish_reason == "length", "finish", "finish reason", found.finish_reason, "length")
    kind = "image_layout" if request.images else "prompt_length"
    require(found.prompt_tokens == length, kind, "prompt length", found.prompt_tokens, length)
    if request.images and found.image_tokens is not None:
        expected = sum(image.tokens for image in request.images)
        require(found.image_tokens == expected, kind, "number of image tokens", found.image_tokens, expected)
    fits = cached is None or 0 <= cached <= start
    require(fits, "cached", "cached tokens", cached, f"0 to {start}, or rows would be missing")


def _check_identity(found: PromptScores, served: Served, require: Require) -> None:
    """The model and its weights are those that the server had at the start."""
    if served.reply_model is not None:
        require(found.model == served.reply_model, "model", "model", found.model, served.reply_model)
    if served.weight_version is not None:
        versions = found.weight_version, served.weight_version
        require(versions[0] == versions[1], "weights", "weight version", *versions)


def _check_values(found: PromptScores, request: ScoreRequest, require: Require) -> None:
    """Log-probs are finite and at most 0; rows are what rows can be."""
    values = found.logprobs
    require(bool(np.isfinite(values).all()), "not_finite", "log-probs", "a value that is not finite", "finite values")
    least = f"above {SMALLEST_LOGPROB:g}, which some servers write for minus infinity"
    require(bool((values > SMALLEST_LOGPROB).all()), "not_finite", "log-probs", values.min(), least)
    require(bool((values <= LARGEST_LOGPROB).all()), "positive", "log-probs", values.max(), "at most 0")
    if found.top is not None:
        largest = int(found.top.ids.max())
        require(largest < request.vocab_size, "top_k", "top-k ids", largest, f"0..{request.vocab_size - 1}")
        check_rows(found.top, request.response_ids, values, lambda ok, *told: require(ok, "top_k", *told))


def _requirement(client: ScoringClient) -> Require:
    def require(ok: bool, kind: str, what: str, got: object, expected: object) -> None:
        if not ok:
            what = f"A teacher's {what} is wrong"
            raise ScoringError(what, kind=kind, where=client.url, got=got, expected=expected)

    return require
