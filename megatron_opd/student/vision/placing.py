"""Which features of which images a rank needs, and at which of its tokens. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_opd.errors import DataError
from megatron_opd.records import Image, PackedBatch


@dataclass(frozen=True, slots=True, eq=False)
class RowImages:
    """The I images of a row."""

    hashes: tuple[str, ...]  # Image.hash; one image may appear more than once
    sizes: np.ndarray  # [I, 2] int64, rows and columns of placeholders
    starts: np.ndarray  # [I] int64, ascending, the position in the row of the first placeholder


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """The F features of U different images, one behind the other, and the N tokens that are given one."""

    hashes: tuple[str, ...]  # [U]
    sizes: np.ndarray  # [U, 2] int64; F is the sum of rows * columns
    tokens: np.ndarray  # [N] int64, ascending, index among this rank's tokens
    features: np.ndarray  # [N] int64, index of the feature that belongs there


def row_images(batch: PackedBatch, start: int, end: int) -> RowImages:
    """Those of the row that is the batch's tokens ``start`` to ``end``."""
    inside = (batch.image_starts >= start) & (batch.image_starts < end)
    hashes = tuple(digest.tobytes().hex() for digest in batch.image_hashes[inside])
    return RowImages(hashes, batch.image_sizes[inside], batch.image_starts[inside] - start)


def sequence_images(images: Sequence[Image]) -> RowImages:
    """Those of a row of one sequence, with which it begins."""
    sizes = np.array([(image.rows, image.columns) for image in images], np.int64).reshape(-1, 2)
    starts = np.array([image.start for image in images], np.int64)
    return RowImages(tuple(image.hash for image in images), sizes, starts)


def check_images(images: RowImages, tokens: np.ndarray, image_token: int | None) -> None:
    """Raise DataError unless the row's ``tokens`` are placeholders wherever an image is to be.

    image_token: the placeholder; None for a model that reads no images.
    """
    for name, start, count in zip(images.hashes, images.starts, images.sizes.prod(axis=1), strict=True):
        found = tokens[start : start + count]
        if image_token is None or len(found) < count or (found != image_token).any():
            raise DataError(
                "An image of the batch is not where its placeholders are",
                where=f"image {name}, {count} tokens from {start} on in its row",
                got=f"tokens {found[:5].tolist()}...",
                expected="a student that reads images" if image_token is None else f"token {image_token} throughout",
            )


def place(images: RowImages, origins: np.ndarray, length: int) -> Places:
    """What a rank with some tokens of a row of ``length`` needs; an image that appears twice is needed once.

    origins [T]: for each of the rank's tokens its position in the row, or -1 where the row was lengthened.
    """
    owner, offset = np.full(length + 1, -1), np.zeros(length + 1, np.int64)  # the last entry is that of position -1
    for number, (start, tokens) in enumerate(zip(images.starts, images.sizes.prod(axis=1), strict=True)):
        owner[start : start + tokens] = number
        offset[start : start + tokens] = np.arange(tokens)
    owners = owner[origins]
    here = np.flatnonzero(owners >= 0)
    first: dict[str, int] = {}  # hash -> the first image that has it
    for number in np.unique(owners[here]).tolist():
        first.setdefault(images.hashes[number], number)
    sizes = images.sizes[list(first.values())]
    begins = dict(zip(first, (np.cumsum(sizes.prod(axis=1)) - sizes.prod(axis=1)).tolist(), strict=True))
    begin = np.array([begins.get(digest, -1) for digest in images.hashes], np.int64)
    return Places(tuple(first), sizes, here, begin[owners[here]] + offset[origins[here]])
