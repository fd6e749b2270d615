"""Rows of the K most likely tokens: how SGLang sends them, and what must hold before one of them is used.

SGLang 0.5.21 sends those of a prompt as base64 of two arrays when it is asked to, those of a response only as lists.
Unlike the ids that it echoes beside a prompt's log-probs, the ids in these rows are never clipped.
Legend: R tokens of the response, K most likely tokens at each; log-probs in nats.
"""

from __future__ import annotations

import base64
from collections.abc import Callable

import numpy as np

from megatron_opd.records import TopRows

LARGEST_LOGPROB = 1e-3  # a log-prob is at most 0; float arithmetic may exceed it a little
SMALLEST_LOGPROB = -9999.0  # what vLLM writes for minus infinity; no real one comes near
LARGEST_MASS = 1 + 1e-3  # likewise for the sum of a row's probabilities
LARGEST_DIFFERENCE = 1e-4  # between a token's log-prob in its row and the one that came beside the token

# Raises its caller's error about (what, got, expected) when the first argument is false.
Check = Callable[[bool, str, object, object], None]


def rows_from_base64(meta: dict, length: int, k: int, check: Check) -> TopRows:
    """``length`` rows of a prompt, all but its first position. KeyError, TypeError, ValueError: malformed."""
    shape, prefix = meta["input_top_logprobs_shape"], meta["input_top_logprobs_null_prefix"]
    check(shape == [length, k], "shape of the top-k rows", shape, [length, k])
    check(prefix == 1, "null prefix of the top-k rows", prefix, "1: nothing predicts the first position")
    return TopRows(
        ids=_array(meta, "input_top_logprobs_idx_flat_b64", "int32", shape, check).astype(np.int64),
        logprobs=_array(meta, "input_top_logprobs_val_flat_b64", "float32", shape, check).astype(np.float32),
    )


def _array(meta: dict, key: str, dtype: str, shape: list[int], check: Check) -> np.ndarray:
    stated, little_endian = meta[f"{key}_dtype"], np.dtype(dtype).newbyteorder("<")
    check(stated == dtype, f"{key}_dtype", stated, dtype)
    data, expected = base64.b64decode(meta[key], validate=True), shape[0] * shape[1] * little_endian.itemsize
    check(len(data) == expected, f"number of bytes in {key}", len(data), expected)
    return np.frombuffer(data, little_endian).reshape(shape)


def rows_from_lists(rows: list, length: int, k: int, check: Check) -> TopRows:
    """``length`` rows of a response, ``[[log-prob, id, null], ...]`` each. TypeError, ValueError: malformed."""
    values = np.array(rows, dtype=np.float64)  # null becomes NaN
    check(values.shape == (length, k, 3), "shape of the top-k rows", values.shape, (length, k, 3))
    ids = values[..., 1]
    whole = (ids == np.round(ids)) & (np.abs(ids) < 2**53)  # what float64 holds exactly
    check(bool(whole.all()), "top-k ids", "a value that is no whole number", "token ids")
    return TopRows(ids=ids.astype(np.int64), logprobs=values[..., 0].astype(np.float32))


def check_rows(top: TopRows, token_ids: np.ndarray, logprobs: np.ndarray, check: Check) -> None:
    """What holds of the rows [R, K] at which ``token_ids`` [R] came with ``logprobs`` [R], whatever the model is."""
    ids, values = top.ids, top.logprobs
    check(bool((ids >= 0).all()), "top-k ids", ids.min(), "0 or more")
    check(bool((np.diff(np.sort(ids, axis=1), axis=1) > 0).all()), "top-k ids", "an id twice in a row", "distinct ids")
    check(bool(np.isfinite(values).all()), "top-k log-probs", "a value that is not finite", "finite values")
    check(bool((values <= LARGEST_LOGPROB).all()), "top-k log-probs", values.max(), "at most 0")
    check(bool((values > SMALLEST_LOGPROB).all()), "top-k log-probs", values.min(), f"above {SMALLEST_LOGPROB:g}")
    check(bool((np.diff(values, axis=1) <= 0).all()), "order of the top-k log-probs", "a rise", "largest first")
    mass = np.exp(values.astype(np.float64)).sum(axis=1).max()
    check(bool(mass <= LARGEST_MASS), "sum of top-k probabilities", mass, "at most 1")
    _check_sampled_tokens(top, token_ids, logprobs, check)


def _check_sampled_tokens(top: TopRows, token_ids: np.ndarray, logprobs: np.ndarray, check: Check) -> None:
    """A token in its row has the same log-prob there; one that is not in it is no more likely than the row's last."""
    hits = top.ids == token_ids[:, None]
    inside, places = hits.any(axis=1), hits.argmax(axis=1)
    in_row = np.where(inside, top.logprobs[np.arange(len(token_ids)), places], top.logprobs[:, -1])
    difference = logprobs - in_row
    fits = np.where(inside, np.abs(difference), difference) <= LARGEST_DIFFERENCE
    check(bool(fits.all()), "log-prob of a token beside its top-k row", logprobs[~fits][:4], in_row[~fits][:4])
