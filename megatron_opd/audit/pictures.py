"""Images of prompts inside a page: small copies as data, since the page needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image as Picture

from megatron_opd.runtime.vision import image_file

LONGEST_SIDE = 360  # pixels of a copy
PLAIN_SIDE = 160  # up to which a copy is kept without loss
QUALITY = 85


@dataclass(frozen=True, slots=True)
class Shown:
    """One image; ``data`` is "" where its file is gone."""

    hash: str
    data: str  # a data: address
    width: int  # of the image that the models saw, in pixels
    height: int


class Pictures:
    """Copies of the images in a folder (``data.images.folder``), each made once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shown = cache(self._read)

    def __call__(self, hashes: Sequence[str] | None) -> list[Shown]:
        """The images of a prompt, a row of trajectories."""
        return [self._shown(digest) for digest in hashes or ()]

    def _read(self, digest: str) -> Shown:
        file = image_file(self._folder, digest)
        if not file.is_file():
            return Shown(digest, "", 0, 0)
        with Picture.open(file, formats=("PNG",)) as picture:
            width, height = picture.size
            picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
            buffer, kind = io.BytesIO(), "PNG" if max(width, height) <= PLAIN_SIDE else "JPEG"
            picture.save(buffer, kind, quality=QUALITY)
        data = base64.b64encode(buffer.getvalue()).decode()
        return Shown(digest, f"data:image/{kind.lower()};base64,{data}", width, height)
