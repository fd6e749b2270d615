"""transformers' vision tower, whole on each rank of the first pipeline stage."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch

from megatron_opd.student.vision.families import Family


def build_tower(family: Family, vision_config: Any, dtype: torch.dtype, sequence_parallel: bool) -> torch.nn.Module:
    """The tower with weights that have yet to be loaded, frozen."""
    tower_class = getattr(importlib.import_module(family.tower_module), family.tower)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # not .to(dtype): angles stay float32
    try:
        with torch.device(torch.cuda.current_device()):
            tower = tower_class(vision_config)
    finally:
        torch.set_default_dtype(before)
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
        # Each rank places features at its own tokens: Megatron is to sum the gradient over tensor-parallel ranks.
        parameter.sequence_parallel = sequence_parallel
    return tower.eval()


def tower_features(tower: torch.nn.Module, patches: np.ndarray, grid: np.ndarray) -> list[torch.Tensor]:
    """Features of images: those in the place of their placeholders [F, H], and those of each deepstack level.

    patches [P, values] float32; grid [U, 3] int64, frames, and rows and columns of patches, of each image.
    """
    weight = next(tower.parameters())
    pixels = torch.from_numpy(patches).to(device=weight.device, dtype=weight.dtype)
    output = tower(pixels, grid_thw=torch.from_numpy(grid).to(weight.device))
    if hasattr(output, "pooler_output"):  # transformers 5
        return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    if isinstance(output, tuple):  # transformers 4, of a tower with deepstack levels
        return [output[0], *output[1]]
    return [output]
