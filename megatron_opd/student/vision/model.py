"""A GPTModel that sees: features of images in the place of their placeholders, and added after the first layers.

    tokens -> embedding ----> place ----> layer 0 --> + --> layer 1 --> + --> ... --> hidden states
    pixels -> vision tower -----^---- level 0 --------^-- level 1 ------^     (levels: Qwen3-VL's deepstack)

The language model has Megatron's names, the tower is ``visual`` with transformers' own names beneath.

Shapes: T tokens of this rank, F features of the images that any of them belongs to, H hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_opd.student.vision.packing import Placed, VisionPacking
from megatron_opd.student.vision.rotary import Rotary, turning
from megatron_opd.student.vision.tower import tower_features


class SeeingLayer(TransformerLayer):
    """A layer that adds its level of the images' features to its output, if there is one."""

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """As TransformerLayer's; hidden states are [T, 1, H]."""
        hidden, context = super().forward(*args, **options)
        packing, level = options["packed_seq_params"], self.layer_number - 1
        if level < len(packing.levels):
            images = packing.images
            added = packing.levels[level].index_select(0, images.features).unsqueeze(1)
            hidden = hidden.index_add(0, images.tokens, added.to(hidden.dtype))
        return hidden, context


def seeing(spec: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    """The layers of a text model's spec, made those of a multimodal one."""
    return dataclasses.replace(spec, layer_specs=[_seeing_layer(layer) for layer in spec.layer_specs])


def _seeing_layer(layer: ModuleSpec) -> ModuleSpec:
    attention = layer.submodules.self_attention
    core = turning(attention.submodules.core_attention)
    attention = dataclasses.replace(
        attention, submodules=dataclasses.replace(attention.submodules, core_attention=core)
    )
    submodules = dataclasses.replace(layer.submodules, self_attention=attention)
    return dataclasses.replace(layer, module=SeeingLayer, submodules=submodules)


class SeeingModel(GPTModel):
    """GPTModel of one pipeline stage; the first one has the vision tower."""

    def __init__(self, *args: Any, rotary: Rotary, tower: torch.nn.Module | None, train_vision: bool, **options: Any):
        super().__init__(*args, **options)
        self._rotary = rotary
        self._train_vision = train_vision
        if tower is not None:
            self.visual = tower
            tower.requires_grad_(train_vision)

    def train(self, mode: bool = True) -> SeeingModel:
        """A frozen tower stays as it is."""
        super().train(mode)
        if self.pre_process and not self._train_vision:
            self.visual.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        packed_seq_params: VisionPacking,
    ) -> torch.Tensor:
        """As GPTModel's, for one packed row: ids [1, T]."""
        # A copy: what is put into it must not outlive this row's way back.
        packing = dataclasses.replace(
            packed_seq_params, rotary=self._rotary(packed_seq_params.positions, self.config.params_dtype)
        )
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
            hidden, packing.levels = self._see(hidden, packing.images)
        return super().forward(input_ids, position_ids, attention_mask, decoder_input=hidden, packed_seq_params=packing)

    def _see(self, hidden: torch.Tensor, images: Placed | None) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Embeddings [T, 1, H] with features in the place of placeholders, and the features of each level."""
        learning = self._train_vision and torch.is_grad_enabled()
        if images is None:
            return (self._see_nothing(hidden) if learning else hidden), ()
        patches = images.reader.patches(images.hashes, images.sizes)
        with torch.set_grad_enabled(learning):
            first, *levels = tower_features(self.visual, patches, images.reader.grid(images.sizes))
        placed = first.index_select(0, images.features).unsqueeze(1).to(hidden.dtype)
        hidden = hidden.index_copy(0, images.tokens, placed)
        if not learning:
            return hidden, tuple(levels)
        leaves = tuple(level.detach().requires_grad_() for level in levels)
        return _GiveBack.apply(hidden, leaves, *levels), leaves

    def _see_nothing(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden``, with a gradient of zero for the tower.

        All data-parallel ranks must reduce the gradient, and gather the weights, of the same parameters in the same
        order, whoever has images.
        """
        config = self.visual.config
        merge = config.spatial_merge_size
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        blank = torch.zeros(merge * merge, values).numpy()
        features = tower_features(self.visual, blank, torch.tensor([[1, merge, merge]]).numpy())
        return hidden + 0.0 * sum(part.sum() for part in features).to(hidden.dtype)


class _GiveBack(torch.autograd.Function):
    """Hidden states as they are; on the way back, the gradients that the layers left at their levels' features.

    The layers read detached features: under full recomputation each layer's way back is a backward pass of its own,
    which would go through the tower as often as there are levels. All of them are over when this one's turn comes.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, leaves: tuple[torch.Tensor, ...], *levels: torch.Tensor
    ) -> torch.Tensor:
        ctx.leaves = leaves
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        given = tuple(leaf.grad for leaf in ctx.leaves)
        if any(part is None for part in given):
            raise RuntimeError("a deepstack level of the vision tower was given no gradient before its embedding")
        return gradient, None, *given
