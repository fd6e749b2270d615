"""The multimodal toy models: a Qwen3-VL of about a million parameters, and the files that a server reads beside it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from toy_multimodal.tokenizer import VOCAB_SIZE
from transformers import GenerationConfig, PreTrainedTokenizerBase, Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH, MERGE, FRAMES = 16, 2, 2  # pixels of a patch's side, patches of a token's side, equal frames of an image
SIDE = PATCH * MERGE
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000.0,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}
VISION = {
    "depth": 3,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_heads": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "out_hidden_size": TEXT["hidden_size"],
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
IDS = {"vision_start_token_id": 512, "vision_end_token_id": 513, "image_token_id": 514, "video_token_id": 515}
TOWER_START = 3.0  # times the usual initial weights of the tower
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen3VLProcessor",
    "patch_size": PATCH,
    "merge_size": MERGE,
    "temporal_patch_size": FRAMES,
    "size": {"shortest_edge": 4 * SIDE**2, "longest_edge": 64 * SIDE**2},
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
}


def new_model(seed: int) -> Qwen3VLForConditionalGeneration:
    """An untrained model; two levels of the tower go to the first two layers of the language model."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **IDS)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():  # from the library's small weights the tower hardly learns at first
        for weight in model.model.visual.parameters():
            weight.mul_(TOWER_START if weight.dim() > 1 else 1.0)
    return model


def load_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    """A saved model, to be computed in float32."""
    return Qwen3VLForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32)


def save_model(model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the weights as bfloat16 with the configuration, the tokenizer and the processor's settings."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(str(folder))
    (folder / "model.safetensors").chmod(0o644)  # the library leaves it private
    tokenizer.save_pretrained(str(folder))
    video = {**PROCESSOR, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, settings in (("preprocessor_config.json", PROCESSOR), ("video_preprocessor_config.json", video)):
        (folder / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def patches(pixels: np.ndarray) -> np.ndarray:
    """``[tokens * MERGE**2, 3 * FRAMES * PATCH**2]`` patches of ``[height, width, 3]`` bytes, in the order of Qwen's
    processors: the patches of one token follow each other."""
    height, width, _ = pixels.shape
    scaled = (pixels.astype(np.float32) / 255 - 0.5) / 0.5
    cut = scaled.reshape(height // SIDE, MERGE, PATCH, width // SIDE, MERGE, PATCH, 3)
    rows = cut.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, PATCH, PATCH)
    return np.repeat(rows, FRAMES, axis=2).reshape(len(rows), -1)
