"""Patches of images against transformers' own processor, and what is said of a wrong file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as Picture
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_opd.errors import DataError
from megatron_opd.runtime.vision import Vision, image_file
from megatron_opd.student.vision.images import ImageReader
from megatron_opd.student.vision.tower import patch_grid, patchify


def vision(patch: int = 16, merge: int = 2, mean: float = 0.5) -> Vision:
    return Vision(
        image_token=1,
        start_token=2,
        end_token=3,
        patch_size=patch,
        merge_size=merge,
        temporal_size=2,
        min_pixels=4 * patch * patch,
        max_pixels=4096 * patch * patch,
        mean=(mean, 0.4, 0.3),
        std=(0.5, 0.25, 0.2),
    )


def keep(folder: Path, name: str, rows: int, columns: int, side: int = 32) -> np.ndarray:
    pixels = np.random.default_rng(list(name.encode())).integers(
        0, 256, (rows * side, columns * side, 3), dtype=np.uint8
    )
    path = image_file(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize(("patch", "merge", "rows", "columns"), [(16, 2, 3, 5), (14, 2, 4, 2), (8, 3, 2, 3)])
def test_patches_equal_those_of_transformers(patch: int, merge: int, rows: int, columns: int) -> None:
    how = vision(patch, merge, mean=0.48)
    side = how.token_pixels
    pixels = np.random.default_rng(0).integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=2,
        size={"shortest_edge": how.min_pixels, "longest_edge": how.max_pixels},
        image_mean=list(how.mean),
        image_std=list(how.std),
    )
    theirs = processor(Picture.fromarray(pixels), return_tensors="np")
    ours = patchify(torch.from_numpy(pixels), how)
    np.testing.assert_allclose(ours.numpy(), theirs["pixel_values"], atol=1e-6, rtol=0)
    assert theirs["image_grid_thw"].tolist() == patch_grid([(rows, columns)], how).tolist()


def test_reader_gives_pixels_as_they_are(tmp_path: Path) -> None:
    first, second = keep(tmp_path, "aa", 1, 2), keep(tmp_path, "bb", 2, 1)
    found = ImageReader(tmp_path, vision()).pixels(("bb", "aa", "bb"), [(2, 1), (1, 2), (2, 1)])
    for pixels, expected in zip(found, (second, first, second), strict=True):
        np.testing.assert_array_equal(pixels, expected)


def test_reader_keeps_what_it_read_last(tmp_path: Path) -> None:
    kept = {name: keep(tmp_path, name, 1, 1) for name in ("aa", "bb", "cc")}
    reader = ImageReader(tmp_path, vision(), cache_bytes=2 * kept["aa"].nbytes)
    for name in ("aa", "bb", "aa", "cc"):  # bb was asked for first
        reader.pixels([name], [(1, 1)])
    for name in kept:
        image_file(tmp_path, name).unlink()
    for name in ("aa", "cc"):
        np.testing.assert_array_equal(reader.pixels([name], [(1, 1)])[0], kept[name])
    with pytest.raises(DataError, match=r"cannot be read[\s\S]*bb"):
        reader.pixels(["bb"], [(1, 1)])


def test_a_row_with_more_images_than_are_kept(tmp_path: Path) -> None:
    kept = {name: keep(tmp_path, name, 1, 1) for name in ("aa", "bb", "cc")}
    found = ImageReader(tmp_path, vision(), cache_bytes=kept["aa"].nbytes).pixels(list(kept), [(1, 1)] * 3)
    for pixels, expected in zip(found, kept.values(), strict=True):
        np.testing.assert_array_equal(pixels, expected)


def test_another_size_than_the_prompt_says(tmp_path: Path) -> None:
    keep(tmp_path, "aa", 1, 2)
    with pytest.raises(DataError, match=r"another size[\s\S]*64 x 32 pixels[\s\S]*32 x 64"):
        ImageReader(tmp_path, vision()).pixels(["aa"], [(2, 1)])


def test_a_file_that_is_no_image(tmp_path: Path) -> None:
    keep(tmp_path, "aa", 1, 1)
    image_file(tmp_path, "aa").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        ImageReader(tmp_path, vision()).pixels(["aa"], [(1, 1)])
