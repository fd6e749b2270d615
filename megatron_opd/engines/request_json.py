"""Token ids as JSON, from an array: 3 ns for an id in a request instead of the 50 of a list of ints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import numpy as np

LARGEST_BITS = 20  # of ids that are looked up in a table; no vocabulary needs more, and a table must stay small


def request_json(body: Mapping[str, object]) -> bytes:
    """``json.dumps`` for a body of which some values may be arrays of token ids, [n] integers, at least 0."""
    return b"{" + b", ".join(_text(name) + b": " + _text(value) for name, value in body.items()) + b"}"


def ids_text(ids: np.ndarray) -> bytes:
    """``7,8,9`` of [n] integers, each after as many blanks as make them equally wide. Raises ValueError below 0."""
    if not len(ids):
        return b""
    smallest, bits = int(ids.min()), int(ids.max()).bit_length()
    if smallest < 0:  # it would be looked up from the table's end
        raise ValueError(f"a token id is {smallest}")
    if bits > LARGEST_BITS:
        return json.dumps(ids.tolist())[1:-1].encode()
    return _table(bits)[ids].tobytes()[:-1]


def _text(value: object) -> bytes:
    return b"[" + ids_text(value) + b"]" if isinstance(value, np.ndarray) else json.dumps(value).encode()


@lru_cache(maxsize=4)
def _table(bits: int) -> np.ndarray:
    """[2 ** bits] texts of one width: each number with blanks before it, which JSON allows, and a comma."""
    width = len(str(2**bits))
    return np.array([b"%*d," % (width, number) for number in range(2**bits)], dtype=f"S{width + 1}")
