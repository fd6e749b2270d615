"""Models and layouts of the tests of a multimodal student's files."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText
from vision_models import make_vision_model

KINDS = {
    "qwen3": ("qwen3_vl", False),
    "qwen3_tied": ("qwen3_vl", True),
    "qwen2_5": ("qwen2_5_vl", False),
    "half": ("qwen2_5_vl", True),  # in bfloat16
}
CONVERTED = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
}
SHARD = 60_000  # bytes: several files for each model

TRAINED_KIND = "qwen3"
TRAINED = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {"data_parallel": 2},
}
# Whose checkpoints each layout loads.
LOADS = {"tp1": ["tp1", "tp2", "dp2"], "tp2": ["pp2"], "pp2": ["tp2", "dp2"], "dp2": ["pp2", "tp1"]}


def make_models(folder: Path) -> None:
    """One folder for each kind."""
    for kind, (family, tied) in KINDS.items():
        make_vision_model(folder / kind, family, tied=tied)
        if kind == "half":
            model = AutoModelForImageTextToText.from_pretrained(folder / kind, dtype=torch.bfloat16)
            model.save_pretrained(folder / kind)
