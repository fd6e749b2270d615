"""Images of prompts on their way to a server, whichever engine it is.

    prompt       [.., start, image, image, image, image, end, ..]    as the model reads it, P tokens
    collapsed    [.., start, image, end, ..]                         as a server wants it, with the PNG file beside
    left out     [.., ..]                                            for a model that sees nothing

All positions, lengths and cached tokens, of requests and of answers, are those of the prompt as the model reads it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_opd.errors import DataError, EngineError
from megatron_opd.records import Image, Prompt
from megatron_opd.runtime.vision import image_file

REMEMBERED_BYTES = 64 << 20  # of encoded images; the samples of a group ask for the same ones at about the same time
REQUEST_BYTES = 256 << 20  # of the encoded images of one request


class ImageFolder:
    """The run's resized images, encoded for requests. ``folder``: as ``runtime.vision.image_file`` has it.

    A file is read again for requests that are far apart: only the last ones are remembered.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own: dict[str, str] = {}
        self._remembered: OrderedDict[str, str] = OrderedDict()
        self._size = 0

    def keep(self, png: bytes) -> str:
        """Hash of an image that is kept here and in no file, such as one that is only sent to try a server."""
        digest = hashlib.sha256(png).hexdigest()
        self._own[digest] = base64.b64encode(png).decode()
        return digest

    async def encoded(self, images: Sequence[Image]) -> list[str]:
        """Base64 of each PNG file. Raises DataError for one that is missing or damaged, EngineError for too many."""
        found = [await self._find(image.hash) for image in images]
        size = sum(len(text) for text in found)
        if size > REQUEST_BYTES:
            raise EngineError(
                "The images of a prompt are too large for a request",
                kind="too_large",
                got=f"{len(images)} images of {size >> 20} MiB, encoded",
                expected=f"at most {REQUEST_BYTES >> 20} MiB",
                fix="lower data.images.max_pixels or data.images.max_per_prompt",
            )
        return found

    async def _find(self, digest: str) -> str:
        known = self._own.get(digest) or self._remembered.get(digest)
        if known is not None:
            return known
        text = await asyncio.to_thread(_read, image_file(self._folder, digest), digest)
        if digest not in self._remembered:
            self._remembered[digest] = text
            self._size += len(text)
        while self._size > REMEMBERED_BYTES and len(self._remembered) > 1:
            _, oldest = self._remembered.popitem(last=False)
            self._size -= len(oldest)
        return text


def _read(path: Path, digest: str) -> str:
    fix = "delete the folder's sources/, so that the images are made again, and keep the folder while a run needs it"
    try:
        png = path.read_bytes()
    except OSError as error:
        raise DataError("An image of a prompt cannot be read", where=path, got=error, fix=fix) from error
    if hashlib.sha256(png).hexdigest() != digest:
        raise DataError("An image is not the one that its name says", where=path, got=f"{len(png)} bytes", fix=fix)
    return base64.b64encode(png).decode()


def image_places(length: int, images: Sequence[Image]) -> np.ndarray:
    """[length] bool: which tokens of a text are placeholders of an image."""
    places = np.zeros(length, dtype=bool)
    for image in images:
        places[image.start : image.start + image.tokens] = True
    return places


def collapsed(token_ids: Sequence[int] | np.ndarray, images: Sequence[Image]) -> np.ndarray:
    """``token_ids`` with one placeholder for each image. Raises EngineError when there is one more, of no image.

    A response may contain a placeholder: a server would look for its image.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    if not images:
        return ids
    dropped = image_places(len(ids), images)
    dropped[[image.start for image in images]] = False
    ids, placeholder = ids[~dropped], ids[images[0].start]
    found = int((ids == placeholder).sum())
    if found != len(images):
        raise EngineError(
            "A text contains an image's placeholder without an image",
            kind="image_layout",
            got=f"{found} placeholders, id {placeholder}",
            expected=f"{len(images)}, one for each image of the prompt",
        )
    return ids


def without_images(prompt: Prompt) -> tuple[int, ...]:
    """The prompt's tokens as a model without vision is asked: without placeholders and the two tokens around them."""
    kept = ~image_places(len(prompt.token_ids), prompt.images)
    for image in prompt.images:
        kept[[image.start - 1, image.start + image.tokens]] = False
    return tuple(np.asarray(prompt.token_ids)[kept].tolist())
