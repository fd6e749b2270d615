"""Tiny random multimodal checkpoints, with all files that transformers and a server read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

TEXT_TOKENIZER = Path(__file__).parents[2] / "tools/toy/models/student"
TOKENIZER = Path(__file__).parents[2] / "tools/toy_multimodal/models/teacher"  # the same, images are ids 512 to 515
_TEXT: dict[str, Any] = {
    "vocab_size": 516,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_IDS = {"vision_start_token_id": 512, "vision_end_token_id": 513, "image_token_id": 514, "video_token_id": 515}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}


def _qwen3_vl(tied: bool) -> Qwen3VLForConditionalGeneration:
    text = {
        **_TEXT,
        "head_dim": 32,
        "rope_parameters": {**_ROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 16},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 64},
        "deepstack_visual_indexes": [0, 2],
    }
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    config.text_config.tie_word_embeddings = tied
    return Qwen3VLForConditionalGeneration(config)


def _qwen2_5_vl(tied: bool) -> Qwen2_5_VLForConditionalGeneration:
    text = {**_TEXT, "rope_parameters": {**_ROPE, "mrope_section": [2, 3, 3]}}
    vision = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 14},
        **{"spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64, "window_size": 56},
        "fullatt_block_indexes": [1],
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied, **_IDS)
    config.text_config.tie_word_embeddings = tied
    return Qwen2_5_VLForConditionalGeneration(config)


FAMILIES = {"qwen3_vl": _qwen3_vl, "qwen2_5_vl": _qwen2_5_vl}
_PATCH = {"qwen3_vl": (16, 0.5), "qwen2_5_vl": (14, 0.45)}


def make_vision_model(folder: Path, family: str = "qwen3_vl", *, tied: bool = False, seed: int = 0) -> Path:
    """Write a checkpoint of ``family`` (a key of FAMILIES) with random float32 weights; returns ``folder``."""
    torch.manual_seed(seed)
    model = FAMILIES[family](tied).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from the initial zeros and ones, so that a swap is seen
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.save_pretrained(folder)
    patch, mean = _PATCH[family]
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor" if family == "qwen3_vl" else "Qwen2_5_VLProcessor",
        "patch_size": patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * (2 * patch) ** 2, "longest_edge": 64 * (2 * patch) ** 2},
        "image_mean": [mean] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    video = processor | {"video_processor_type": f"{'Qwen3VL' if family == 'qwen3_vl' else 'Qwen2VL'}VideoProcessor"}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder
