"""What a multimodal student is tested on: tiny models, images, samples, and transformers as the reference."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as Picture
from student_case import Sample, next_logprobs, pack
from transformers import AutoConfig, AutoModelForImageTextToText
from vision_models import make_vision_model

from megatron_opd.records import Image, PackedBatch
from megatron_opd.runtime.vision import image_file, read_vision
from megatron_opd.student.vision.families import FAMILIES
from megatron_opd.student.vision.tower import patch_grid, patchify

START, END, PLACEHOLDER = 512, 513, 514
VOCAB = 516
TEXT_VOCAB = 512
SHAPES = ((2, 2), (3, 5), (4, 2), (2, 2))  # rows and columns of the images; the first and the last are of one size

# Kinds of models: family, tied, number of layers.
KINDS = {
    "qwen3": ("qwen3_vl", False, 4),
    "qwen3_tied": ("qwen3_vl", True, 4),
    "qwen3_deep": ("qwen3_vl", True, 8),  # whose deepstack levels fit the first of four parts
    "qwen2_5": ("qwen2_5_vl", False, 4),
}
# Layouts, and the kinds that are tried under each.
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "tp1": ({}, tuple(KINDS)),
    "tp2": ({"tensor_parallel": 2, "recompute": "full"}, ("qwen3",)),
    "tp2_sequence": ({"tensor_parallel": 2, "sequence_parallel": True}, ("qwen3", "qwen2_5")),
    "pp2": ({"pipeline_parallel": 2, "recompute": "full"}, ("qwen3_tied",)),
    "pp2_virtual2": ({"pipeline_parallel": 2, "virtual_pipeline": 2}, ("qwen3_deep",)),
    "cp2": ({"context_parallel": 2, "recompute": "selective"}, ("qwen3", "qwen2_5")),
    "dp2": ({"data_parallel": 2, "overlap_gradients": True, "overlap_parameters": True}, ("qwen3", "qwen2_5")),
    "tp2_cp2": ({"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2}, ("qwen3",)),
}


@dataclass(frozen=True)
class Seen:
    """A sample and the images in it."""

    sample: Sample
    images: tuple[Image, ...]


def make_kind(folder: Path, kind: str) -> Path:
    """Write a tiny random checkpoint."""
    family, tied, layers = KINDS[kind]
    make_vision_model(folder, family, tied=tied)
    config = AutoConfig.from_pretrained(folder)
    if layers == config.text_config.num_hidden_layers:
        return folder
    config.text_config.num_hidden_layers = layers
    config.text_config.layer_types = ["full_attention"] * layers
    torch.manual_seed(1)
    model = AutoModelForImageTextToText.from_config(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def make_images(folder: Path, model: Path) -> list[tuple[str, int, int]]:
    """Write random images of SHAPES as a run keeps them: hash, rows and columns of each."""
    generator, side = np.random.default_rng(2), read_vision(model).token_pixels
    made = []
    for rows, columns in SHAPES:
        pixels = generator.integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
        buffer = io.BytesIO()
        Picture.fromarray(pixels).save(buffer, "PNG")
        digest = hashlib.sha256(buffer.getvalue()).hexdigest()
        path = image_file(folder, digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
        made.append((digest, rows, columns))
    return made


def make_samples(model: VisionReference, images: list[tuple[str, int, int]]) -> list[Seen]:
    """Text alone; an image; three of different sizes, one of them first of all; text; the first image once more."""
    generator = np.random.default_rng(3)
    layouts: list[list[int | tuple[str, int, int]]] = [
        [9],
        [3, images[0], 6],
        [images[1], 2, images[2], images[3], 5],
        [6],
        [4, images[0], 3],
    ]
    return [_make_sample(model, layout, generator) for layout in layouts]


def _make_sample(model: VisionReference, layout: list[Any], generator: np.random.Generator) -> Seen:
    """``layout``: how many random tokens of text, or which image, one after the other."""
    tokens: list[int] = []
    images = []
    for part in layout:
        if isinstance(part, int):
            tokens += generator.integers(0, TEXT_VOCAB, part).tolist()
            continue
        digest, rows, columns = part
        images.append(Image(digest, rows, columns, len(tokens) + 1))
        tokens += [START, *[PLACEHOLDER] * rows * columns, END]
    ids, length = np.array(tokens), len(tokens)
    model.know(ids, tuple(images))
    weights = generator.uniform(0.1, 1.0, length)
    weights[: length // 2] = 0.0
    weights[-1] = 0.0
    with torch.no_grad():
        behaviour = np.append(next_logprobs(model, ids).numpy(), 0.0) + generator.uniform(-0.1, 0.1, length)
    sample = Sample(
        ids,
        advantages=generator.normal(size=length),
        behaviour=behaviour,
        weights=weights,
        lags=np.zeros(length, int),
        slopes=np.zeros(length),
        forward_weights=np.where(np.arange(length) % 2, weights, 0.0),
        top_ids=np.tile([1, 2, 3], (length, 1)),
        top_logprobs=np.log(np.full((length, 3), 0.2)),
    )
    return Seen(sample, tuple(images))


def pack_seen(seen: list[Seen], rows: list[list[int]], denominator: float) -> PackedBatch:
    """One rank's batch: ``rows`` lists the samples of each row."""
    batch = pack([one.sample for one in seen], rows, denominator)
    order = [seen[index] for row in rows for index in row]
    images = [
        dataclasses.replace(image, start=image.start + int(offset))
        for one, offset in zip(order, batch.sequence_offsets[:-1], strict=True)
        for image in one.images
    ]
    return dataclasses.replace(
        batch,
        image_hashes=np.array([list(bytes.fromhex(image.hash)) for image in images], np.uint8).reshape(-1, 32),
        image_sizes=np.array([(image.rows, image.columns) for image in images], np.int64).reshape(-1, 2),
        image_starts=np.array([image.start for image in images], np.int64),
    )


class VisionReference:
    """transformers' model, called with tokens alone as a text model is: it knows which images are in which tokens."""

    def __init__(self, folder: Path, images: Path, *, train_vision: bool = True) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self._model.model.visual.requires_grad_(train_vision)
        self._vision, self._images = read_vision(folder), images
        self._family = FAMILIES[self._model.config.model_type]
        self._known: dict[bytes, tuple[Image, ...]] = {}

    def know(self, tokens: np.ndarray, images: tuple[Image, ...]) -> None:
        """``images`` are those of ``tokens``."""
        self._known[tokens.tobytes()] = images

    def __call__(self, ids: torch.Tensor) -> Any:
        images = self._known[ids.numpy().tobytes()]
        if not images:
            return self._model(input_ids=ids)
        return self._model(
            input_ids=ids,
            pixel_values=torch.cat([patchify(self._pixels(image), self._vision) for image in images]),
            image_grid_thw=patch_grid([(image.rows, image.columns) for image in images], self._vision),
            mm_token_type_ids=(ids == PLACEHOLDER).int(),
        )

    def parameters(self) -> Any:
        """Those that learn."""
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Any:
        """The same under the names that a checkpoint has."""
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                yield self._saved(name), parameter

    def weights(self) -> dict[str, torch.Tensor]:
        """All, under the names that a checkpoint has."""
        return {self._saved(name): parameter.detach() for name, parameter in self._model.named_parameters()}

    def _saved(self, name: str) -> str:
        for prefix, saved in (
            ("model.visual.", self._family.vision_prefix),
            ("model.language_model.", self._family.text_prefix),
        ):
            if name.startswith(prefix):
                return saved + name.removeprefix(prefix)
        return name

    def _pixels(self, image: Image) -> torch.Tensor:
        with Picture.open(image_file(self._images, image.hash)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB")))
