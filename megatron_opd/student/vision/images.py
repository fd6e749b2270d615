"""The run's folder of images, as a rank of the student reads it. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from megatron_opd.errors import DataError
from megatron_opd.runtime.vision import Vision, image_file

Size = tuple[int, int]  # rows and columns of placeholders

CACHE_BYTES = 256 * 1024**2  # of decoded images: those of a group's rollouts are read once
DECODERS = 4  # threads


class ImageReader:
    """Reads resized images by hash, and keeps those that it read last."""

    def __init__(self, folder: Path, vision: Vision, cache_bytes: int = CACHE_BYTES) -> None:
        """``folder``: that of ``runtime.vision.image_file``."""
        self.vision = vision
        self.folder, self._limit = folder, cache_bytes
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def pixels(self, hashes: Sequence[str], sizes: Sequence[Size]) -> list[np.ndarray]:
        """[height, width, 3] uint8 each. Raises DataError for a missing file, and for one that has not its size."""
        missing = list(dict.fromkeys(name for name in hashes if name not in self._kept))
        with ThreadPoolExecutor(DECODERS) as pool:
            read = dict(zip(missing, pool.map(self._read, missing), strict=True))
        found = [read[name] if name in read else self._kept[name] for name in hashes]
        for name, size, pixels in zip(hashes, sizes, found, strict=True):
            self._check(name, size, pixels)
            self._keep(name, pixels)
        return found

    def _keep(self, name: str, pixels: np.ndarray) -> None:
        """As the one that was asked for last."""
        if name not in self._kept:
            self._bytes += pixels.nbytes
        self._kept[name] = pixels
        self._kept.move_to_end(name)
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes

    def _read(self, name: str) -> np.ndarray:
        path = image_file(self.folder, name)
        try:
            with PillowImage.open(path) as image:
                return np.array(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError) as error:  # the last two: Pillow's, of a damaged file
            raise DataError(
                "An image of a prompt cannot be read",
                where=path,
                got=error,
                fix="all machines must see the same data.images.folder",
            ) from error

    def _check(self, name: str, size: Size, pixels: np.ndarray) -> None:
        rows, columns = (count * self.vision.token_pixels for count in size)
        if pixels.shape[:2] != (rows, columns):
            raise DataError(
                "An image of a prompt has another size than its prompt says",
                where=image_file(self.folder, name),
                got=f"{pixels.shape[1]} x {pixels.shape[0]} pixels",
                expected=f"{columns} x {rows}",
            )
