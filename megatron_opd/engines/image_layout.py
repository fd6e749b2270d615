"""Whether a server puts an image's placeholders where we do.

A server expands placeholders itself, by the size of the image that it decodes. If it counted in another way, or made
its tokens anew from the text, every position after the image would be another one: of log-probs, of the cache, of the
response. So each answer must count the same tokens, and for each new size the tokens around are compared one by one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import numpy as np

from megatron_opd.engines.images import image_places
from megatron_opd.engines.scores import TokenIds
from megatron_opd.errors import EngineError
from megatron_opd.records import Image

FIX = (
    "serve the model's own image processor settings, and an SGLang that keeps the tokens of a request: "
    "SGLANG_MM_AVOID_RETOKENIZE=1, its default"
)


class ImageLayout:
    """What one server has shown to get right. ``url`` is for errors."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._proven: set[tuple[int, int]] = set()  # rows and columns
        self._one_at_a_time = asyncio.Lock()

    def check_counts(self, meta: dict, length: int, images: Sequence[Image]) -> None:
        """Raise EngineError unless an answer's account of its prompt fits one of ``length`` tokens with ``images``."""
        expected = sum(image.tokens for image in images)
        counts = meta["prompt_tokens"], meta.get("image_tokens") or expected  # old servers do not tell
        self.require(
            counts == (length, expected), f"{counts[0]} tokens, {counts[1]} of images", f"{length}, {expected}"
        )

    async def check_places(
        self, token_ids: TokenIds, images: Sequence[Image], echo: Callable[[TokenIds], Awaitable[np.ndarray]]
    ) -> None:
        """Raise EngineError unless the tokens of a prompt stand where they should, if an image has a new size.

        echo: asks the server for all ids of a text, [N]; those of placeholders may be any.
        """
        sizes = {(image.rows, image.columns) for image in images}
        if sizes <= self._proven:
            return
        async with self._one_at_a_time:
            if sizes <= self._proven:
                return
            echoed = await echo(token_ids)
            asked = np.asarray(token_ids)
            text = ~image_places(len(asked), images)
            self.require(len(echoed) == len(asked), f"{len(echoed)} tokens", len(asked))
            for place in np.flatnonzero(text & (echoed != asked))[:1]:
                self.require(False, f"id {echoed[place]} at position {place}", f"id {asked[place]}")
            self._proven |= sizes

    def require(self, ok: bool, got: object, expected: object) -> None:
        """Raise EngineError, of the kind that drops of teachers are counted under, unless ``ok``."""
        if not ok:
            what = "A server places a prompt's images differently"
            raise EngineError(what, kind="image_layout", where=self._url, got=got, expected=expected, fix=FIX)
