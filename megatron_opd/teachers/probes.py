"""What a server is tried with: texts that nobody else would send, one of them with an image."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image as Picture

from megatron_opd.engines.images import ImageFolder
from megatron_opd.records import Image
from megatron_opd.runtime.vision import Vision

PROBE_TOKENS = 64  # longer than a page of any engine's cache
PARTS = (16, 32, 48)  # where the prompt ends when the probe is scored in parts


@dataclass(frozen=True, eq=False)
class Probe:
    """A sequence that is scored in several ways."""

    name: str  # for errors
    token_ids: np.ndarray  # [N] int64
    cuts: tuple[int, ...]  # where the prompt may end, ascending; the first scores the most
    images: tuple[Image, ...] = ()


def text_probe(rng: np.random.Generator, vocab_size: int) -> Probe:
    """Random ids of the whole vocabulary, of which everything but the first is scored."""
    return Probe("text", rng.integers(0, vocab_size, PROBE_TOKENS), (1, *PARTS))


def image_probe(rng: np.random.Generator, vocab_size: int, vision: Vision, folder: ImageFolder) -> Probe:
    """An image of random pixels between random ids; what follows it is scored.

    It has the smallest size that servers leave as it is, and is not square, so that rows and columns cannot be swapped.
    The ids are in an order that no text has: a server that made tokens anew from their text would find others.
    """
    rows, columns = smallest_size(vision)
    side = vision.token_pixels
    buffer = io.BytesIO()
    pixels = rng.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    Picture.fromarray(pixels).save(buffer, "PNG")
    marks = min(vision.image_token, vision.start_token, vision.end_token)
    ids = rng.integers(0, min(marks, vocab_size), PROBE_TOKENS)  # ordinary ones: others may be marks of images too
    before, after = ids[: PARTS[0]], ids[PARTS[0] :]
    image = Image(folder.keep(buffer.getvalue()), rows, columns, start=len(before) + 1)
    placeholders = [vision.image_token] * image.tokens
    token_ids = np.concatenate([before, [vision.start_token], placeholders, [vision.end_token], after])
    first = image.start + image.tokens + 1
    return Probe("with an image", token_ids, tuple(first + part for part in (1, *PARTS[:-1])), (image,))


def smallest_size(vision: Vision) -> tuple[int, int]:
    """Rows and columns of placeholders, one column more than rows, that make at least the smallest image."""
    tokens = vision.min_pixels / vision.token_pixels**2
    rows = max(1, math.ceil((math.sqrt(1 + 4 * tokens) - 1) / 2))  # rows * (rows + 1) >= tokens
    return rows, rows + 1
