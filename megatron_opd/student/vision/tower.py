"""transformers' vision tower, whole on each rank of the first pipeline stage."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_opd.runtime.vision import Vision
from megatron_opd.student.vision.families import Family
from megatron_opd.student.vision.images import Size


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


def even_out(chunks: list[torch.nn.Module]) -> None:
    """Give all tensor-parallel ranks the mean of their gradients of the tower. ``chunks``: wrapped for training.

    Without sequence parallelism each rank has the whole gradient, the same but for the order in which a GPU adds
    numbers; left alone, their towers would drift apart, and the refresh sends one of them.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or chunks[0].config.sequence_parallel:
        return
    for tower in (chunk.module.visual for chunk in chunks if hasattr(chunk.module, "visual")):
        for parameter in tower.parameters():
            if parameter.requires_grad:
                torch.distributed.all_reduce(parameter.main_grad, group=group)
                parameter.main_grad.div_(group.size())


def patchify(pixels: torch.Tensor, vision: Vision) -> torch.Tensor:
    """Pixels [height, width, 3] uint8 -> patches [P, 3 * temporal_size * patch_size ** 2] float32.

    As transformers' Qwen2VLImageProcessor: the patches of one placeholder follow each other, placeholders row after
    row; within a patch come colour, time, height and width. height and width are multiples of ``token_pixels``.
    """
    mean, std = (torch.tensor(values, device=pixels.device) for values in (vision.mean, vision.std))
    merge, patch = vision.merge_size, vision.patch_size
    rows, columns = pixels.shape[0] // vision.token_pixels, pixels.shape[1] // vision.token_pixels
    blocks = ((pixels.float() / 255 - mean) / std).view(rows, merge, patch, columns, merge, patch, 3)
    frame = blocks.permute(0, 3, 1, 4, 6, 2, 5).unsqueeze(5)
    return frame.expand(-1, -1, -1, -1, -1, vision.temporal_size, -1, -1).reshape(rows * columns * merge * merge, -1)


def patch_grid(sizes: Iterable[Size], vision: Vision) -> torch.Tensor:
    """[U, 3] int64: frames, and rows and columns of patches, of images of these sizes."""
    merge = vision.merge_size
    return torch.tensor([[1, rows * merge, columns * merge] for rows, columns in sizes])


def tower_features(tower: torch.nn.Module, patches: torch.Tensor, grid: torch.Tensor) -> list[torch.Tensor]:
    """Features of images: those in the place of their placeholders [F, H], and those of each deepstack level.

    patches [P, values]: all images, one behind the other; grid: see ``patch_grid``.
    """
    weight = next(tower.parameters())
    output = tower(patches.to(weight), grid_thw=grid.to(weight.device))
    if hasattr(output, "pooler_output"):  # transformers 5
        return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]
    if isinstance(output, tuple):  # transformers 4, of a tower with deepstack levels
        return [output[0], *output[1]]
    return [output]
