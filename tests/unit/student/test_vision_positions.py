"""Positions, and where features go, against transformers and against a slow search."""

from __future__ import annotations

import contextlib
import itertools
import types
from functools import partial

import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel, apply_multimodal_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLTextRotaryEmbedding

from megatron_opd.errors import DataError
from megatron_opd.records import Image, PackedBatch
from megatron_opd.student.context import lengthen, positions_of_rank
from megatron_opd.student.vision.placing import RowImages, check_images, place, row_images, sequence_images
from megatron_opd.student.vision.positions import image_positions
from megatron_opd.student.vision.rotary import Rotary, _Turn

NO_IMAGES = np.empty((0, 2), np.int64)


def random_row(generator: np.random.Generator) -> tuple[np.ndarray, RowImages]:
    """Bounds of one to four sequences, and their images: also at a start, at an end, and side by side."""
    bounds, starts, sizes = [0], [], []
    for _ in range(generator.integers(1, 5)):
        at = bounds[-1]
        for _ in range(generator.integers(0, 4)):
            at += int(generator.integers(0, 4))
            size = generator.integers(1, 6, 2)
            starts.append(at)
            sizes.append(size)
            at += int(size.prod())
        bounds.append(max(at + int(generator.integers(0, 4)), bounds[-1] + 1))
    names = tuple(f"image {generator.integers(0, 3)} {rows} {columns}" for rows, columns in sizes)
    return np.array(bounds), RowImages(names, np.array(sizes, np.int64).reshape(-1, 2), np.array(starts, np.int64))


def transformers_positions(model: type, bounds: np.ndarray, images: RowImages) -> np.ndarray:
    """What the model's own code says, one sequence after the other."""
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=4))
    own = types.SimpleNamespace(config=config, get_vision_position_ids=partial(model.get_vision_position_ids, None))
    found = []
    for begin, end in itertools.pairwise(bounds):
        inside = (images.starts >= begin) & (images.starts < end)
        kinds = np.zeros(end - begin, np.int64)
        for start, size in zip(images.starts[inside] - begin, images.sizes[inside], strict=True):
            kinds[start : start + size.prod()] = 1
        grid = np.concatenate([np.ones((inside.sum(), 1), np.int64), 2 * images.sizes[inside]], axis=1)
        positions, _ = model.get_rope_index(
            own,
            torch.zeros(1, end - begin, dtype=torch.int64),
            torch.from_numpy(kinds)[None],
            image_grid_thw=torch.from_numpy(grid),
        )
        found.append(positions[:, 0].numpy())
    return np.concatenate(found, axis=1)


def apart(images: RowImages) -> bool:
    """Whether other tokens are between any two: by them alone transformers tells images from each other."""
    ends = images.starts + images.sizes.prod(axis=1)
    return bool((images.starts[1:] > ends[:-1]).all())


@pytest.mark.parametrize("model", [Qwen3VLModel, Qwen2_5_VLModel])
def test_positions_equal_those_of_transformers(model: type) -> None:
    generator, compared = np.random.default_rng(0), 0
    for _ in range(400):
        bounds, images = random_row(generator)
        if apart(images):
            compared += 1
            found = image_positions(bounds, images.starts, images.sizes)
            np.testing.assert_array_equal(found, transformers_positions(model, bounds, images))
    assert compared > 100


def test_the_example_of_the_module() -> None:
    found = image_positions(np.array([0, 10]), np.array([2]), np.array([[2, 3]]))
    assert found.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_text_counts_from_the_start_of_its_sequence() -> None:
    found = image_positions(np.array([0, 3, 5]), np.empty(0, np.int64), NO_IMAGES)
    assert found.tolist() == [[0, 1, 2, 0, 1]] * 3


@pytest.mark.parametrize(("ranks", "parts"), [(1, 1), (2, 1), (2, 2), (3, 2)])
def test_each_token_is_given_its_own_feature(ranks: int, parts: int) -> None:
    """Cut for context and for sequence parallelism; every placeholder of the row is served exactly once."""
    generator = np.random.default_rng(1)
    for _ in range(100):
        bounds, images = random_row(generator)
        length = int(bounds[-1])
        longer, origins, _ = lengthen(bounds, 2 * ranks if ranks > 1 else 1, 2 * ranks * parts)
        served = []
        for rank in range(ranks):
            mine = origins[positions_of_rank(longer, ranks, rank)] if ranks > 1 else origins
            for part in np.split(mine, parts):
                places = place(images, part, length)
                content = features_of(places.hashes, places.sizes)
                for token, feature in zip(places.tokens, places.features, strict=True):
                    served.append((int(part[token]), content[feature]))
                assert len(set(places.hashes)) == len(places.hashes)
                used = {content[feature][0] for feature in places.features}
                assert used == set(places.hashes)  # none is looked at for nothing
        expected = [
            (int(start) + offset, feature)
            for start, name, size in zip(images.starts, images.hashes, images.sizes, strict=True)
            for offset, feature in enumerate(features_of((name,), size[None]))
        ]
        assert sorted(served) == sorted(expected)


def features_of(hashes: tuple[str, ...], sizes: np.ndarray) -> list[tuple[str, int]]:
    """Features that say what they are: of which image, and which of it."""
    return [(name, index) for name, size in zip(hashes, sizes, strict=True) for index in range(size.prod())]


def test_images_of_a_batch_and_of_a_sequence() -> None:
    batch = types.SimpleNamespace(
        image_hashes=np.arange(96, dtype=np.uint8).reshape(3, 32),
        image_sizes=np.array([[1, 2], [2, 2], [1, 1]]),
        image_starts=np.array([1, 10, 15]),
    )
    found = row_images(as_batch(batch), 9, 20)
    assert found.hashes == (bytes(range(32, 64)).hex(), bytes(range(64, 96)).hex())
    assert found.starts.tolist() == [1, 6]
    assert found.sizes.tolist() == [[2, 2], [1, 1]]
    alone = sequence_images([Image("ab", 2, 3, 4)])
    assert (alone.hashes, alone.sizes.tolist(), alone.starts.tolist()) == (("ab",), [[2, 3]], [4])
    assert sequence_images(()).sizes.shape == (0, 2)


@pytest.mark.parametrize(
    ("tokens", "image_token", "said"),
    [
        ([7, 5, 5, 5, 7], 5, None),
        ([7, 5, 5, 7, 7], 5, r"tokens \[5, 5, 7\][\s\S]*token 5 throughout"),
        ([7, 5, 5], 5, r"tokens \[5, 5\]"),
        ([7, 5, 5, 5, 7], None, "a student that reads images"),
    ],
)
def test_an_image_that_is_not_where_its_placeholders_are(
    tokens: list[int], image_token: int | None, said: str | None
) -> None:
    images = sequence_images([Image("ab", 1, 3, 1)])
    with pytest.raises(DataError, match=said) if said else contextlib.nullcontext():
        check_images(images, np.array(tokens), image_token)


def as_batch(batch: types.SimpleNamespace) -> PackedBatch:
    return batch  # type: ignore[return-value]


def test_interleaved_angles_equal_those_of_transformers() -> None:
    positions, sections = torch.randint(0, 50, (3, 20)), [6, 5, 5]
    parameters = {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": sections}
    config = types.SimpleNamespace(
        rope_parameters=parameters, max_position_embeddings=64, head_dim=32, hidden_size=64, num_attention_heads=2
    )
    theirs = Qwen3VLTextRotaryEmbedding(config)(torch.zeros(1), positions[:, None])
    ours = Rotary(32, 5000.0, sections, interleaved=True)(positions, torch.float32)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[:, 0], other[0], atol=1e-6, rtol=0)


def test_chunked_rotation_equals_that_of_transformers_and_so_does_its_gradient() -> None:
    positions, sections = torch.randint(0, 50, (3, 20)), [2, 3, 3]
    query = torch.randn(20, 4, 16, requires_grad=True)
    frequencies = 1.0 / 5000.0 ** (torch.arange(0, 16, 2) / 16)
    angles = positions[:, None, :, None] * frequencies
    both = torch.cat((angles, angles), dim=-1)
    theirs, _ = apply_multimodal_rotary_pos_emb(
        query.transpose(0, 1)[None], query.transpose(0, 1)[None], both.cos(), both.sin(), sections
    )
    ours = _Turn.apply(query, *Rotary(16, 5000.0, sections, interleaved=False)(positions, torch.float32))
    torch.testing.assert_close(ours, theirs[0].transpose(0, 1), atol=1e-5, rtol=0)
    weights = torch.randn(20, 4, 16)
    (mine,) = torch.autograd.grad((ours * weights).sum(), query, retain_graph=True)
    (other,) = torch.autograd.grad((theirs[0].transpose(0, 1) * weights).sum(), query)
    torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
