"""The honest scorer of a model that sees: it gives an image the tokens of its size, or others, as it is told."""

from __future__ import annotations

import base64
import io

from honest_scorer import HonestScorer
from PIL import Image as Picture

from megatron_opd.runtime.vision import Vision

VISION = Vision(
    image_token=502,
    start_token=500,
    end_token=501,
    patch_size=16,
    merge_size=2,
    temporal_size=2,
    min_pixels=4 * 32 * 32,
    max_pixels=64 * 32 * 32,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


class SeeingScorer(HonestScorer):
    """What an image shows changes nothing; only its size counts."""

    def __init__(self) -> None:
        super().__init__()
        self.wider = 0  # columns of tokens that it gives an image more than it has
        self.late = False  # whether its placeholders begin a token too late: one after the text that follows
        self.told_more = 0  # image tokens that it says beyond those that there are

    def tokens(self, body: dict) -> list[int]:
        if "image_data" not in body:
            return body["input_ids"]
        images = iter(body["image_data"])
        expanded: list[int] = []
        for token in body["input_ids"]:
            expanded += [token] * (self._size(next(images)) if token == VISION.image_token else 1)
        assert next(images, None) is None
        if self.late:
            first, end = expanded.index(VISION.image_token), expanded.index(VISION.end_token)
            expanded[first], expanded[end] = expanded[end], expanded[first]
        return expanded

    def echoed(self, body: dict, token_ids: list[int]) -> list[int]:
        hidden = VISION.image_token if "image_data" in body else None
        return [0 if token == hidden else token for token in token_ids]

    def account(self, body: dict) -> dict:
        if "image_data" not in body:
            return {}
        return {"image_tokens": self.tokens(body).count(VISION.image_token) + self.told_more}

    def _size(self, image: str) -> int:
        width, height = Picture.open(io.BytesIO(base64.b64decode(image))).size
        side = VISION.token_pixels
        return height // side * (width // side + self.wider)
