"""What engines receive of a multimodal student under each layout, and the probe that is compared afterwards."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage
from safetensors.torch import load_file
from vision_models import FAMILIES, make_vision_model
from vision_push_case import CASES

from megatron_opd.data.images import target_size
from megatron_opd.runtime.vision import Vision, image_file, read_vision
from megatron_opd.student.probe import TOKENS, image_probe, text_probe
from megatron_opd.student.vision.families import FAMILIES as NAMES


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    for family in FAMILIES:
        make_vision_model(folder / family, family, tied=family == "qwen2_5_vl")
    support = Path(__file__).parents[2] / "support"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(Path(__file__).with_name("vision_push_worker.py")), str(folder)],
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_an_engine_receives_all_that_learns_and_no_frozen_tower(work: Path, case: str) -> None:
    family, _, learning, _ = CASES[case]
    expected = load_file(work / family / "model.safetensors")
    prefix = NAMES[family].vision_prefix
    if not learning:
        expected = {name: tensor for name, tensor in expected.items() if not name.startswith(prefix)}
    found = load_file(work / case / "received.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], 2 * tensor) for name, tensor in expected.items())
    size, live, difference = json.loads((work / case / "found.json").read_text())
    assert size == sum(tensor.nbytes for tensor in expected.values()) and len(live) == 1
    assert 0 < difference < 50  # the engine says -1 of all tokens, text before and after the image


def vision(**changes: int) -> Vision:
    known = {
        **{"image_token": 90, "start_token": 88, "end_token": 89, "patch_size": 16, "merge_size": 2},
        **{"temporal_size": 2, "min_pixels": 4 * 32**2, "max_pixels": 64 * 32**2},
    }
    return Vision(**known | changes, mean=(0.5,) * 3, std=(0.5,) * 3)


@pytest.mark.parametrize(
    ("smallest", "largest", "grid"),
    [
        (4, 64, (5, 6)),
        (1, 2, (1, 2)),
        (1, 1, (1, 1)),
        (64, 16384, (8, 9)),
        (4, 4, (2, 2)),
        (6, 6, (2, 3)),
        (7, 7, (7, 1)),
    ],
)
def test_the_probes_image_is_of_a_size_that_a_server_leaves_as_it_is(
    smallest: int, largest: int, grid: tuple[int, int], tmp_path: Path
) -> None:
    seen = vision(min_pixels=smallest * 32**2 - 5, max_pixels=largest * 32**2 + 5)
    (image,) = image_probe(100, seen, tmp_path).images
    assert (image.rows, image.columns) == grid
    with PillowImage.open(image_file(tmp_path, image.hash)) as picture:
        width, height = picture.size
    assert (height, width) == (32 * image.rows, 32 * image.columns)
    assert target_size(height, width, 32, seen.min_pixels, seen.max_pixels) == (height, width)


def test_the_probe_is_always_the_same_and_has_no_other_special_tokens(tmp_path: Path) -> None:
    probe, again = image_probe(100, vision(), tmp_path), image_probe(100, vision(), None)
    (image,) = probe.images
    assert np.array_equal(probe.token_ids, again.token_ids) and probe.images == again.images
    ids = probe.token_ids
    inside = slice(image.start, image.start + image.tokens)
    assert ids[image.start - 1] == 88 and set(ids[inside]) == {90} and ids[inside.stop] == 89
    text = np.concatenate([ids[: image.start - 1], ids[inside.stop + 1 :]])
    assert len(text) == TOKENS and text.max() < 88 and image.start > 1
    assert (~probe.compared).nonzero()[0].tolist() == list(range(inside.start - 1, inside.stop - 1))
    assert text_probe(100).images == () and text_probe(100).compared.all() and len(text_probe(100).token_ids) == TOKENS


def test_the_probes_file_is_the_one_of_its_hash(tmp_path: Path) -> None:
    model = make_vision_model(tmp_path / "model")
    (image,) = image_probe(516, read_vision(model), tmp_path).images
    png = image_file(tmp_path, image.hash).read_bytes()
    pixels = np.asarray(PillowImage.open(io.BytesIO(png)))
    assert pixels.shape == (32 * image.rows, 32 * image.columns, 3) and pixels.std() > 60
    assert [path for path in tmp_path.rglob("*.partial")] == []
