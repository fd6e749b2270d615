"""Rotary embedding by positions of time, height and width, applied where attention begins.

Megatron's own cuts one table of angles by the bounds of the sequences, which cannot tell the rows and columns of an
image. So its embedding is left out, and each layer's attention turns query and key itself, by what travels with the
row (``packing.VisionPacking``): packed rows, parts of rows, pipeline stages and recomputation need nothing more.

Shapes: T tokens of this context-parallel rank, D size of a head.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from megatron_opd.student.vision.packing import VisionPacking


class Rotary:
    """Cosines and sines of a model's rotary embedding."""

    def __init__(self, head_size: int, base: float, sections: list[int], interleaved: bool) -> None:
        """sections: how many of the D / 2 angles belong to time, height and width."""
        self._head_size, self._base = head_size, base
        self._owner = _interleaved(sections) if interleaved else _chunked(sections)  # [D / 2], 0 to 2

    def __call__(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [3, T] -> cosines and sines [T, 1, D] of ``dtype``."""
        steps = torch.arange(0, self._head_size, 2, dtype=torch.float32, device=positions.device)
        frequencies = 1.0 / self._base ** (steps / self._head_size)
        owner = torch.tensor(self._owner, device=positions.device)
        angles = positions.float()[owner].T * frequencies  # [T, D / 2]
        both = torch.cat((angles, angles), dim=-1)[:, None]
        return both.cos().to(dtype), both.sin().to(dtype)


def _chunked(sections: list[int]) -> list[int]:
    return [kind for kind, count in enumerate(sections) for _ in range(count)]


def _interleaved(sections: list[int]) -> list[int]:
    """t h w t h w ... as long as there are heights and widths; time has the rest."""
    owner = [0] * sum(sections)
    for kind in (1, 2):
        for index in range(kind, 3 * sections[kind], 3):
            owner[index] = kind
    return owner


class _Turn(torch.autograd.Function):
    """x -> x * cos + rotated(x) * sin. Keeps nothing of x: on the way back the gradient is turned the other way."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@cache
def turning(attention: type) -> type:
    """A subclass of a core attention, which turns query and key [T, heads, D] before it attends."""

    def forward(
        self: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, *args: Any, **options: Any
    ) -> torch.Tensor:
        packing = options["packed_seq_params"]
        if not isinstance(packing, VisionPacking) or packing.rotary is None:
            raise TypeError(f"attention of a multimodal model was given {type(packing).__name__} without angles")
        query, key = (_Turn.apply(tensor, *packing.rotary) for tensor in (query, key))
        return attention.forward(self, query, key, *args, **options)

    return type(f"Turning{attention.__name__}", (attention,), {"forward": forward})
