"""Images of prompts: sizes, limits, damaged files, and that one picture is resized once."""

from __future__ import annotations

import base64
import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from megatron_opd.config import ImagesConfig
from megatron_opd.data.image_sources import image_sources
from megatron_opd.data.images import ImageStore, open_store, target_size
from megatron_opd.data.rows import MISSING, Flaw
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.vision import Vision, image_file

VISION = Vision(
    **{"image_token": 514, "start_token": 512, "end_token": 513, "patch_size": 16, "merge_size": 2},
    **{"temporal_size": 2, "min_pixels": 64 * 64, "max_pixels": 256 * 256},
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)


def picture(width: int, height: int, seed: int = 0) -> Picture.Image:
    return Picture.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Picture.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images", VISION, ImagesConfig())


def test_sizes_are_those_of_the_models_own_processor_which_leaves_them_as_they_are() -> None:
    generator = np.random.default_rng(0)
    for height, width in generator.integers(20, 3000, (500, 2)).tolist():
        size = target_size(height, width, 32, 64 * 64, 1000 * 1000)
        assert size == smart_resize(height, width, factor=32, min_pixels=64 * 64, max_pixels=1000 * 1000)
        assert size == smart_resize(*size, factor=32, min_pixels=64 * 64, max_pixels=1000 * 1000)
        assert size[0] % 32 == size[1] % 32 == 0


def test_limits_between_which_there_is_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="no multiples of 32"):
        target_size(100, 300, 32, 63 * 64, 64 * 64)


def test_an_image_is_kept_under_the_hash_of_its_file_and_counted_in_tokens(store: ImageStore) -> None:
    kept = store.add("images", encoded(picture(130, 65)))
    file = image_file(store.folder, kept.hash)
    assert hashlib.sha256(file.read_bytes()).hexdigest() == kept.hash
    with Picture.open(file) as resized:
        assert (resized.size, resized.mode) == ((128, 64), "RGB")
    assert (kept.rows, kept.columns) == (2, 4)


def test_what_fits_already_keeps_its_pixels(store: ImageStore) -> None:
    image = picture(96, 64)
    kept = store.add("images", encoded(image))
    with Picture.open(image_file(store.folder, kept.hash)) as resized:
        assert np.array_equal(np.asarray(resized), np.asarray(image))


def test_an_image_is_decoded_once(store: ImageStore, monkeypatch: pytest.MonkeyPatch) -> None:
    content = encoded(picture(96, 64))
    first = store.add("images", content)
    monkeypatch.setattr(Picture, "open", lambda *_, **__: pytest.fail("decoded again"))
    assert ImageStore(store.folder, VISION, ImagesConfig()).add("images", content) == first


def test_another_size_is_another_image_and_a_lost_file_is_made_again(store: ImageStore) -> None:
    content = encoded(picture(200, 200))
    first = store.add("images", content)
    small = ImageStore(store.folder, VISION, ImagesConfig(max_pixels=64 * 64)).add("images", content)
    assert (first.rows, small.rows) == (6, 2)
    image_file(store.folder, first.hash).unlink()
    assert store.add("images", content) == first
    assert image_file(store.folder, first.hash).is_file()


def test_transparency_shows_white_and_a_turned_photograph_stands_upright(store: ImageStore) -> None:
    clear = store.add("images", encoded(Picture.new("RGBA", (64, 64), (255, 0, 0, 0))))
    with Picture.open(image_file(store.folder, clear.hash)) as resized:
        assert np.asarray(resized).min() == 255
    exif = Picture.Exif()
    exif[0x0112] = 6  # a quarter turn to the right
    turned = store.add("images", encoded(picture(128, 64), "JPEG", exif=exif))
    assert (turned.rows, turned.columns) == (4, 2)


def _header_only(width: int, height: int) -> bytes:
    """A PNG file that promises a picture and holds none."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    promised = struct.pack(">I", 1000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + promised


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b"not an image", "bytes that are no image"),
        (encoded(picture(200, 200))[:-400], "a damaged image"),
        (encoded(picture(200, 200), "JPEG")[:2000], "a damaged image"),
        (_header_only(64, 64), "a damaged image"),
        (_header_only(9_000, 9_000), "9000 x 9000 pixels"),
        (_header_only(60_000, 60_000), "a damaged image: Image size"),
        (_header_only(5000, 20), "5000 x 20 pixels"),
        (encoded(picture(64, 64), "PDF"), "bytes that are no image"),
    ],
)
def test_a_bad_image_is_a_flaw_and_leaves_nothing(store: ImageStore, content: bytes, got: str) -> None:
    with pytest.raises(Flaw, match=got) as caught:
        store.add("pictures", content)
    assert caught.value.field == "pictures"
    assert not list(store.folder.rglob("*.*"))


def test_a_large_file_is_not_read(store: ImageStore, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate(33 << 20)
    with pytest.raises(Flaw, match=r"got 33.0 MiB, expected at most 32 MiB"):
        store.add("images", large)


def test_limits_that_contradict_each_other_and_a_blind_model_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="as small and as large"):
        ImageStore(tmp_path, VISION, ImagesConfig(min_pixels=300 * 300))
    (tmp_path / "config.json").write_text("{}")
    assert open_store(tmp_path, tmp_path, ImagesConfig(), None) is None
    with pytest.raises(ConfigError, match="cannot see"):
        open_store(tmp_path, tmp_path, ImagesConfig(), "images")


@pytest.mark.parametrize("size", [(1, 1), (40, 40)])  # in base64 shorter and longer than a path may be
def test_every_form_of_a_source(tmp_path: Path, size: tuple[int, int]) -> None:
    content = encoded(picture(*size))
    file = tmp_path / "a.png"
    file.write_bytes(content)
    text = base64.b64encode(content).decode()
    forms = [content, f"data:image/png;base64,{text}", {"bytes": content, "path": "gone"}, {"base64": text}]
    forms += [text] if size > (1, 1) else []
    assert image_sources("images", forms, tmp_path) == [content] * len(forms)
    assert image_sources("images", ["a.png", {"path": "a.png", "bytes": None}, str(file)], tmp_path) == [file] * 3
    assert image_sources("images", None, tmp_path) == image_sources("images", MISSING, tmp_path) == []


@pytest.mark.parametrize("value", ["gone.png", 7, "", {}, {"url": "x"}, "http://host/a.png", "A" * 300 + "!", [None]])
def test_every_other_form_is_a_flaw(value: object, tmp_path: Path) -> None:
    with pytest.raises(Flaw):
        image_sources("images", value, tmp_path)
