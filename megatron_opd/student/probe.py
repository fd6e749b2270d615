"""The sequence whose log-probs trainer and rollout engines compare after every refresh."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from megatron_opd.records import Image
from megatron_opd.runtime.vision import Vision, image_file, write_whole

TOKENS = 64  # that are no image's
_BEFORE = 8  # of them before the image
_PLACEHOLDERS = 30  # of the image, where its model has none larger or smaller: more than one window of Qwen2.5-VL's


@dataclass(frozen=True)
class Probe:
    """A fixed sequence of ordinary ids: what it says does not matter, only that both ends agree on it."""

    token_ids: np.ndarray  # [L] int64; of an image all placeholders
    images: tuple[Image, ...] = ()

    @property
    def compared(self) -> np.ndarray:
        """[L - 1] bool: entry t is whether token t + 1 is one that a model predicts, and no placeholder."""
        found = np.ones(len(self.token_ids), bool)
        for image in self.images:
            found[image.start : image.start + image.tokens] = False
        return found[1:]


def text_probe(vocab_size: int) -> Probe:
    """For a model that reads no images."""
    return Probe(np.random.default_rng(0).integers(0, vocab_size, TOKENS))


def image_probe(vocab_size: int, vision: Vision, folder: Path | None) -> Probe:
    """For one that does: an image of noise, which a server's image processor leaves as it is, among ordinary ids.

    The same image at every refresh: an engine that answers out of what it kept of an older tower is found out. It is
    put into ``folder``, that of the prompts' images, if there is one here.
    """
    generator = np.random.default_rng(0)
    rows, columns = _grid(vision)
    pixels = generator.integers(0, 256, (rows * vision.token_pixels, columns * vision.token_pixels, 3), np.uint8)
    file = io.BytesIO()
    PillowImage.fromarray(pixels).save(file, "PNG")
    png = file.getvalue()
    # Ids from the first special one of images on are left out: those of videos are among them.
    text = generator.integers(0, min(vision.image_token, vision.start_token, vision.end_token, vocab_size), TOKENS)
    seen = [vision.start_token, *[vision.image_token] * (rows * columns), vision.end_token]
    image = Image(hashlib.sha256(png).hexdigest(), rows, columns, start=_BEFORE + 1)
    if folder is not None:
        write_whole(image_file(folder, image.hash), png)
    return Probe(np.concatenate([text[:_BEFORE], seen, text[_BEFORE:]]), (image,))


def _grid(vision: Vision) -> tuple[int, int]:
    """Rows and columns of placeholders, not equal where they need not be: a server that swaps them is found out."""
    side = vision.token_pixels**2
    smallest, largest = -(-vision.min_pixels // side), vision.max_pixels // side
    tokens = min(max(smallest, _PLACEHOLDERS), largest)
    columns = math.isqrt(tokens) + 1
    while -(-tokens // columns) * columns > largest:
        columns -= 1
    return -(-tokens // columns), columns
