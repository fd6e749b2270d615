"""What a multimodal model should say of a sequence: log-probs by transformers, and prompts with images of our own."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image as Picture
from transformers import AutoModelForImageTextToText
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_opd.records import Image, Prompt
from megatron_opd.runtime.vision import Vision, image_file


def save_image(folder: Path, vision: Vision, rows: int, columns: int, seed: int) -> str:
    """Hash of an image of random pixels, which is now in ``folder``."""
    side = vision.token_pixels
    pixels = np.random.default_rng(seed).integers(0, 256, (rows * side, columns * side, 3), dtype=np.uint8)
    written = folder / "new.png"
    Picture.fromarray(pixels).save(written)
    digest = hashlib.sha256(written.read_bytes()).hexdigest()
    image_file(folder, digest).parent.mkdir(exist_ok=True)
    written.rename(image_file(folder, digest))
    return digest


def image_prompt(folder: Path, vision: Vision, sizes: list[tuple[int, int]], seed: int = 0) -> Prompt:
    """A prompt with images of these rows and columns between random ids."""
    rng = np.random.default_rng(seed)
    ids, images = rng.integers(3, 500, 9).tolist(), []
    for number, (rows, columns) in enumerate(sizes):
        digest = save_image(folder, vision, rows, columns, seed=100 * seed + number)
        images.append(Image(digest, rows, columns, start=len(ids) + 1))
        ids += [vision.start_token, *[vision.image_token] * images[-1].tokens, vision.end_token]
        ids += rng.integers(3, 500, 5).tolist()
    return Prompt(f"{seed}-{sizes}", "math", "", tuple(ids), "", images=tuple(images))


class VisionReference:
    """A checkpoint in transformers, float32; ``folder`` holds the images."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = AutoModelForImageTextToText.from_pretrained(model, dtype=torch.float32).eval()
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(model)
        self._placeholder = self._model.config.image_token_id
        self._folder = folder

    def logprobs(self, prompt: Prompt, response: list[int]) -> np.ndarray:
        """[R] float32, of the response's tokens."""
        ids = torch.tensor([[*prompt.token_ids, *response]])
        inputs = {}
        if prompt.images:
            pictures = [Picture.open(image_file(self._folder, image.hash)) for image in prompt.images]
            inputs = dict(self._processor(images=pictures, return_tensors="pt"))
            inputs["mm_token_type_ids"] = (ids == self._placeholder).int()
        with torch.no_grad():
            logits = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs).logits[0]
        first = len(prompt.token_ids) - 1
        return logits[first:-1].log_softmax(-1)[range(len(response)), response].numpy()
