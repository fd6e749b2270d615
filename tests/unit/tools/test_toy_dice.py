"""The shipped dice are the tool's, and pictures hold the answers; the models read them as Qwen's processors do."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from make_toy_multimodal import ROWS, SHIPPED, URL, problems, write_data
from PIL import Image
from safetensors.torch import load_file
from toy_multimodal.dice import COLOURS, DIE, PALETTE, PIPS, SIZES, Picture
from toy_multimodal.model import PATCH, SIDE, patches
from toy_multimodal.tokenizer import make_tokenizer
from toy_multimodal.training import collate, encode
from toy_multimodal.world import MARK
from transformers import Qwen2VLImageProcessor

from megatron_opd.runtime.vision import read_vision

DRAWN = problems("dice", "train", 300)
FILES = [f"{name}_{split}.jsonl" for name in ("dice", "cross") for split in ROWS]


def read(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def pixels_of(image: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(base64.b64decode(image.removeprefix(URL)))).convert("RGB"))


def seen_pips(pixels: np.ndarray, colour: str) -> int:
    """Pips of a die, counted in the picture: white squares inside its bounds."""
    rows, columns = np.nonzero((pixels == COLOURS[colour]).all(-1))
    die = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert die.shape[:2] == (DIE, DIE)
    return int((die == 255).all(-1).sum()) // 36


@pytest.mark.parametrize("name", FILES)
def test_the_shipped_data_is_made_again(tmp_path: Path, name: str) -> None:
    write_data(tmp_path)
    made, shipped = read(tmp_path, name), read(SHIPPED / "data", name)
    pictures = [[image for row in rows for image in row.pop("images", [])] for rows in (made, shipped)]
    assert made == shipped and len(pictures[0]) == len(pictures[1])
    for ours, theirs in zip(*pictures, strict=True):  # zlib may pack the same pixels in another way
        assert (pixels_of(ours) == pixels_of(theirs)).all()


@pytest.mark.parametrize("name", ["dice", "cross"])
def test_held_out_questions_are_not_trained_on(name: str) -> None:
    train, held_out = (
        {(row["prompt"], *row.get("images", [])) for row in read(SHIPPED / "data", f"{name}_{split}.jsonl")}
        for split in ROWS
    )
    assert not train & held_out and len(held_out) == ROWS["eval"] * (2 if name == "cross" else 1)


def test_the_pictures_hold_the_answers() -> None:
    kinds = set()
    for row in read(SHIPPED / "data", "dice_train.jsonl"):
        assert row["prompt"].count(MARK) == len(row["images"])
        colours = re.findall("|".join(COLOURS), row["prompt"])
        images = [pixels_of(image) for image in row["images"]]
        seen = [seen_pips(images[min(i, len(images) - 1)], colour) for i, colour in enumerate(colours)]
        minus = bool(re.search(" - | minus ", row["prompt"]))
        kinds.add((len(images), len(seen), minus))
        assert int(row["answer"]) == seen[0] + (-1 if minus else 1) * sum(seen[1:])
    assert kinds == {(1, 1, False), (1, 2, False), (1, 2, True), (2, 2, False), (2, 2, True)}


def test_careless_solutions_are_wrong_unless_there_is_nothing_to_skip() -> None:
    boxed = re.compile(r"\\boxed\{(\d+)\}$")
    assert all(boxed.search(p.clean)[1] == p.answer for p in DRAWN)
    easy = [p.clean == p.careless for p in DRAWN]
    assert 0.1 < sum(easy) / len(easy) < 0.3
    assert all(boxed.search(p.careless)[1] != p.answer for p in DRAWN if p.clean != p.careless)


@pytest.mark.parametrize("size", SIZES)
def test_patches_are_those_of_the_models_own_processor(size: tuple[int, int]) -> None:
    width, height = size
    picture = Picture(width, height, (("red", 5, 3, 2), ("blue", 6, 33, 3), ("green", 2, 36, 37)))
    assert all(picture.value(name) in PIPS for name in COLOURS)
    pixels = np.array(PALETTE, dtype=np.uint8)[picture.pixels()]
    processor = Qwen2VLImageProcessor(
        patch_size=PATCH,
        merge_size=SIDE // PATCH,
        size={"shortest_edge": 4 * SIDE**2, "longest_edge": 64 * SIDE**2},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    theirs = processor(Image.fromarray(pixels), return_tensors="np")
    assert theirs["image_grid_thw"].tolist() == [[1, height // PATCH, width // PATCH]]
    np.testing.assert_allclose(patches(pixels), theirs["pixel_values"], atol=1e-6)


def test_each_picture_gets_its_placeholders() -> None:
    tokenizer = make_tokenizer()
    problem = next(p for p in DRAWN if len(p.pictures) == 2)
    row = encode(tokenizer, problem, problem.clean)
    inputs = collate(tokenizer, [row])
    counts = [p.width * p.height // SIDE**2 for p in problem.pictures]
    text = tokenizer.decode(row.ids[: row.start])
    marks = "".join("<|vision_start|>" + "<|image_pad|>" * count + "<|vision_end|>" for count in counts)
    assert marks in text and MARK not in text
    assert int(inputs["mm_token_type_ids"].sum()) == sum(counts)
    assert len(inputs["pixel_values"]) == sum(counts) * (SIDE // PATCH) ** 2
    assert tokenizer.decode(row.ids[row.start :]) == problem.clean + tokenizer.eos_token


def test_everything_fits_in_six_megabytes() -> None:
    files = [path for path in SHIPPED.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 6e6


def test_the_models_are_of_one_family() -> None:
    student, teacher = (SHIPPED / "models" / name for name in ("student", "teacher"))
    for name in ("tokenizer.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (student / name).read_bytes() == (teacher / name).read_bytes()
    weights, theirs = (load_file(folder / "model.safetensors") for folder in (student, teacher))
    differs = {name for name in weights if not weights[name].equal(theirs[name])}
    assert differs and not any("visual" in name for name in differs)
    vision = read_vision(student)
    assert (vision.start_token, vision.end_token, vision.image_token) == (512, 513, 514)
    assert vision.token_pixels == SIDE and all(side % SIDE == 0 for size in SIZES for side in size)


def test_pictures_are_never_resized() -> None:
    vision = read_vision(SHIPPED / "models" / "student")
    assert all(vision.min_pixels <= width * height <= vision.max_pixels for width, height in SIZES)
