"""The body of a request as JSON, where token ids are an array: 3 ns for an id instead of the 50 of a list of ints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np


def request_json(body: Mapping[str, object]) -> bytes:
    """``json.dumps`` for a body of which some values may be arrays of token ids, [n] integers, at least 0."""
    return b"{" + b", ".join(_text(name) + b": " + _text(value) for name, value in body.items()) + b"}"


def _text(value: object) -> bytes:
    if not isinstance(value, np.ndarray):
        return json.dumps(value).encode()
    if not len(value):
        return b"[]"
    if value.min() < 0:  # it would be looked up from the table's end
        raise ValueError(f"the token id {value.min()}, which is below 0")
    return b"[" + _table(int(value.max()).bit_length())[value].tobytes()[:-1] + b"]"


@lru_cache(maxsize=4)
def _table(bits: int) -> np.ndarray:
    """[2 ** bits] texts of one width: each number with blanks before it, which JSON allows, and a comma."""
    width = len(str(2**bits))
    return np.array([b"%*d," % (width, number) for number in range(2**bits)], dtype=f"S{width + 1}")
