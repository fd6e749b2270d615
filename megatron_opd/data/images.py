"""Images of prompts: opened, checked and resized once, and kept as PNG files under their hash.

Trainer, rollout engines and teachers all read the file that is made here. Its size is one that their own image
processors leave as it is, so all see the same pixels and give the image the same number of tokens: a server that
resized by itself would interpolate, and perhaps count, in another way than the trainer.

    source      chart.jpg, 1000 x 707 pixels
    resized     992 x 704, the nearest multiples of patch size * merge size = 32
    Image       hash "3f9c...", rows 22, columns 31: 682 placeholder tokens
    file        FOLDER/3f/3f9c....png, and FOLDER/sources/<hash of the source>.json that leads to it
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image as Picture
from PIL import ImageOps, UnidentifiedImageError

from megatron_opd.config import ImagesConfig
from megatron_opd.data.image_sources import REPAIR, Source
from megatron_opd.data.rows import Flaw
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.vision import Vision, image_file, read_vision, write_whole

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # others have decoders that start programs
MOST_ELONGATED = 200  # longer side / shorter side, as the models' own processors have it
PNG_EFFORT = 1  # of 9: a file a tenth larger, made in a third of the time


@dataclass(frozen=True, slots=True)
class Kept:
    """A resized image in the folder."""

    hash: str  # as in records.Image, and so are the next two
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ImageStore:
    """A folder of resized images, for one way to resize. Threads and processes may use it at once.

    Cost of an image that is new: reading, decoding, resizing, and writing a PNG file, about 20 ms for a million pixels;
    of one that is known: reading and hashing its file. Decoding and resizing leave other threads running.
    """

    folder: Path
    vision: Vision
    limits: ImagesConfig

    def __post_init__(self) -> None:
        smallest, largest = self.pixels
        if smallest > largest:
            raise ConfigError(
                "Images cannot be as small and as large as is asked for",
                where="data.images.min_pixels, data.images.max_pixels",
                got=f"{smallest} and {largest}",
                expected="the first at most the second",
                fix="correct the two; null takes that of the student's image processor",
            )

    @property
    def pixels(self) -> tuple[int, int]:
        """Fewest and most pixels of a resized image."""
        return pixel_range(self.vision, self.limits)

    def add(self, name: str, source: Source) -> Kept:
        """Keep an image; ``name`` is the field of the record that holds it. Raises Flaw when it cannot be used."""
        content = self._content(name, source)
        side = self.vision.token_pixels
        settings = f"{side}/{self.pixels}".encode()
        known = self.folder / "sources" / f"{hashlib.sha256(settings + content).hexdigest()}.json"
        if known.is_file():
            kept = Kept(**json.loads(known.read_text()))
            if image_file(self.folder, kept.hash).is_file():
                return kept
        picture = self._resized(name, content)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", compress_level=PNG_EFFORT)
        png = buffer.getvalue()
        kept = Kept(hashlib.sha256(png).hexdigest(), picture.height // side, picture.width // side)
        write_whole(image_file(self.folder, kept.hash), png)
        facts = {"hash": kept.hash, "rows": kept.rows, "columns": kept.columns}
        write_whole(known, json.dumps(facts).encode())
        return kept

    def _content(self, name: str, source: Source) -> bytes:
        most = self.limits.max_file_mb << 20
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > most:
            got, expected = f"{size / (1 << 20):.1f} MiB", f"at most {self.limits.max_file_mb} MiB"
            raise Flaw(name, got, expected, "shrink the image, or raise data.images.max_file_mb")
        try:
            return source if isinstance(source, bytes) else source.read_bytes()
        except OSError as error:
            raise Flaw(name, error, "an image that can be read", REPAIR) from error

    def _resized(self, name: str, content: bytes) -> Picture.Image:
        try:
            with Picture.open(io.BytesIO(content), formats=FORMATS) as picture:
                self._check_size(name, *picture.size)
                upright = ImageOps.exif_transpose(picture)  # as a camera was held
                height, width = target_size(upright.height, upright.width, self.vision.token_pixels, *self.pixels)
                return _on_white(upright).resize((width, height), Picture.Resampling.BICUBIC)
        except UnidentifiedImageError as error:
            raise Flaw(name, "bytes that are no image", " or ".join(FORMATS), REPAIR) from error
        except (OSError, ValueError, SyntaxError, EOFError, Picture.DecompressionBombError) as error:
            raise Flaw(name, f"a damaged image: {error}", "an image that can be decoded", REPAIR) from error

    def _check_size(self, name: str, width: int, height: int) -> None:
        """Before anything is decoded: a small file may hold a picture that fills the memory."""
        most = self.limits.max_source_megapixels
        if width * height > most * 1_000_000:
            got, expected = f"{width} x {height} pixels", f"at most {most} million"
            raise Flaw(name, got, expected, "shrink the image, or raise data.images.max_source_megapixels")
        if max(width, height) > MOST_ELONGATED * min(width, height):
            expected = f"a longer side of at most {MOST_ELONGATED} times the shorter"
            raise Flaw(name, f"{width} x {height} pixels", expected, REPAIR)


def open_store(model: Path, folder: Path, limits: ImagesConfig, column: str | None) -> ImageStore | None:
    """The store for a model that sees, in ``folder``; None for a model that does not.

    column: of the prompts, that holds their images. Raises ModelError, and ConfigError for a model that would not see
    them.
    """
    vision = read_vision(model)
    if vision is not None:
        return ImageStore(folder, vision, limits)
    if column is not None:
        raise ConfigError(
            "The model cannot see the images of its prompts",
            where="data.columns.images",
            got=f"{column}, and no vision_config in {model / 'config.json'}",
            fix="set data.columns.images to null, or take a multimodal model",
        )
    return None


def pixel_range(vision: Vision, limits: ImagesConfig) -> tuple[int, int]:
    """Fewest and most pixels of a resized image."""
    return limits.min_pixels or vision.min_pixels, limits.max_pixels or vision.max_pixels


def target_size(height: int, width: int, side: int, smallest: int, largest: int) -> tuple[int, int]:
    """Height and width to resize to: multiples of ``side`` with ``smallest`` to ``largest`` pixels in all.

    The rule of Qwen2-VL's image processor (``smart_resize``), which all later ones share. What it gives, it leaves as
    it is; where it would not, the two limits are too close together. Raises ValueError.
    """
    found = _nearest(height, width, side, smallest, largest)
    if _nearest(*found, side, smallest, largest) != found:
        raise ValueError(f"no multiples of {side} near {width} x {height} have {smallest} to {largest} pixels")
    return found


def _nearest(height: int, width: int, side: int, smallest: int, largest: int) -> tuple[int, int]:
    rows, columns = max(1, round(height / side)), max(1, round(width / side))
    if rows * columns * side**2 > largest:
        factor = math.sqrt(height * width / largest)
        rows, columns = max(1, int(height / factor / side)), max(1, int(width / factor / side))
    elif rows * columns * side**2 < smallest:
        factor = math.sqrt(smallest / (height * width))
        rows, columns = math.ceil(height * factor / side), math.ceil(width * factor / side)
    return rows * side, columns * side


def _on_white(picture: Picture.Image) -> Picture.Image:
    """In red, green and blue; what is transparent shows white, as a page would."""
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    page = Picture.new("RGBA", picture.size, "white")
    page.alpha_composite(picture.convert("RGBA"))
    return page.convert("RGB")
