"""From the run's folder of images to the patches that a vision tower reads. No torch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from megatron_opd.errors import DataError
from megatron_opd.runtime.vision import Vision, image_file

CACHE_BYTES = 256 * 1024**2  # of decoded images: those of a group's rollouts are read once


def patchify(pixels: np.ndarray, vision: Vision) -> np.ndarray:
    """Pixels [height, width, 3] uint8 -> patches [P, 3 * temporal_size * patch_size ** 2] float32.

    As transformers' Qwen2VLImageProcessor: the patches of one placeholder follow each other, placeholders row after
    row; within a patch come colour, time, height and width. height and width are multiples of ``token_pixels``.
    """
    scaled = (pixels.astype(np.float32) / 255 - np.float32(vision.mean)) / np.float32(vision.std)
    merge, patch = vision.merge_size, vision.patch_size
    rows, columns = pixels.shape[0] // vision.token_pixels, pixels.shape[1] // vision.token_pixels
    blocks = scaled.reshape(rows, merge, patch, columns, merge, patch, 3)
    frame = blocks.transpose(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]  # row, column, 2 in the merge, colour, time, ...
    frames = np.broadcast_to(frame, (*frame.shape[:5], vision.temporal_size, patch, patch))
    return frames.reshape(rows * columns * merge * merge, -1)


class ImageReader:
    """Reads resized images by hash, and keeps those that it read last."""

    def __init__(self, folder: Path, vision: Vision, cache_bytes: int = CACHE_BYTES) -> None:
        """``folder``: that of ``runtime.vision.image_file``."""
        self.vision = vision
        self._folder, self._limit = folder, cache_bytes
        self._kept: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def patches(self, hashes: Iterable[str], sizes: Iterable[tuple[int, int]]) -> np.ndarray:
        """All patches [P, values] float32 of some images, one image behind the other.

        sizes: the rows and columns of placeholders that each must have. Raises DataError for a missing or wrong file.
        """
        return np.concatenate(
            [patchify(self._pixels(*image), self.vision) for image in zip(hashes, sizes, strict=True)]
        )

    def grid(self, sizes: Iterable[tuple[int, int]]) -> np.ndarray:
        """[U, 3] int64: frames, and rows and columns of patches, of images with these rows and columns of tokens."""
        merge = self.vision.merge_size
        return np.array([[1, rows * merge, columns * merge] for rows, columns in sizes], np.int64)

    def _pixels(self, digest: str, size: tuple[int, int]) -> np.ndarray:
        if digest in self._kept:
            self._kept.move_to_end(digest)
            return self._kept[digest]
        pixels = self._read(digest, size)
        self._kept[digest] = pixels
        self._bytes += pixels.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._kept.popitem(last=False)[1].nbytes
        return pixels

    def _read(self, digest: str, size: tuple[int, int]) -> np.ndarray:
        path = image_file(self._folder, digest)
        try:
            with PillowImage.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except OSError as error:
            raise DataError(
                "An image of a prompt cannot be read",
                where=path,
                got=error,
                fix="all machines must see the same data.images.folder",
            ) from error
        expected = tuple(count * self.vision.token_pixels for count in size)
        if pixels.shape[:2] != expected:
            raise DataError(
                "An image of a prompt has another size than its prompt says",
                where=path,
                got=f"{pixels.shape[1]} x {pixels.shape[0]} pixels",
                expected=f"{expected[1]} x {expected[0]}",
            )
        return pixels
