"""A teacher's client that answers as it is told, and the answers of SGLang 0.5.21 to one scoring request."""

from __future__ import annotations

import base64
import copy

import numpy as np

from megatron_opd.engines.sglang_scores import read_scores

VOCAB, K = 512, 3
PROMPT, RESPONSE = np.array([5, 6, 7]), np.array([8, 511, 2])
ROWS = [[None, 7, None], [-0.5, 8, None], [-1.5, 0, None], [-4.5, 2, None]]  # 511, the last id, is echoed as 0
SAMPLED = [-0.5, -1.5, -4.5]
IDS = np.array([[8, 20, 30], [100, 511, 7], [0, 21, 22]])  # the response's last token is not in its row
VALUES = np.array([[-0.5, -1.5, -3.0], [-0.625, -1.5, -2.5], [-0.25, -2.0, -4.0]])


class FakeScorer:
    """Answers each request with the next of the given replies; an exception is raised."""

    url = "http://fake"
    read_scores = staticmethod(read_scores)

    def __init__(self, *replies: object) -> None:
        self.replies, self.requests, self.images = list(replies), [], []

    async def prompt_logprobs(self, token_ids: list[int], start: int, top_k: int = 0, images: tuple = ()) -> dict:
        self.images.append(images)
        self.requests.append((list(token_ids), start, top_k))
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def good_reply(**changes: object) -> dict:
    """Without top-k rows. A change to ``...`` leaves the field out."""
    meta = {
        "finish_reason": {"type": "length", "length": 0},
        "prompt_tokens": 6,
        "cached_tokens": 2,
        "input_token_logprobs": copy.deepcopy(ROWS),
    } | changes
    return {"meta_info": {key: value for key, value in meta.items() if value is not ...}}


def reply_with_rows(ids: np.ndarray = IDS, values: np.ndarray = VALUES, **changes: object) -> dict:
    """With top-k rows."""
    fields = {
        "input_top_logprobs_val_flat_b64": encode(values, "<f4"),
        "input_top_logprobs_idx_flat_b64": encode(ids, "<i4"),
        "input_top_logprobs_val_flat_b64_dtype": "float32",
        "input_top_logprobs_idx_flat_b64_dtype": "int32",
        "input_top_logprobs_shape": list(values.shape),
        "input_top_logprobs_null_prefix": 1,
    }
    return good_reply(**(fields | changes))


def rows_with(index: int, row: list) -> list:
    """``ROWS`` with another row in one place."""
    return [row if i == index else old for i, old in enumerate(copy.deepcopy(ROWS))]


def encode(array: np.ndarray, dtype: str) -> str:
    """Base64 of the array's bytes."""
    return base64.b64encode(array.astype(dtype).tobytes()).decode()
