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
from megatron_opd.student.vision.tower import patch_grid, patchify, tower_features


class SeeingLayer(TransformerLayer):
    """A layer that adds its level of the images' features to its output, if there is one."""

    def forward(self, *args: Any, **options: Any) -> tuple[torch.Tensor, Any]:
        """As TransformerLayer's; hidden states are [T, 1, H]."""
        hidden, context = super().forward(*args, **options)
        packing, level = options["packed_seq_params"], self.layer_number - 1
        if level < len(packing.levels):
            images = packing.images
            added = packing.levels[level].index_select(0, images.features)
            hidden = hidden.index_add(0, images.tokens, added.unsqueeze(1))
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
            tower.requires_grad_(train_vision)
            # First, as it runs first: the order of parameters is that in which data-parallel copies gather them.
            self._modules = {"visual": tower, **self._modules}

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
            features = self._features(packing.images)
            hidden = self.embedding(input_ids=input_ids, position_ids=position_ids)
            hidden, packing.levels = self._placed(hidden, packing.images, features)
        return super().forward(input_ids, position_ids, attention_mask, decoder_input=hidden, packed_seq_params=packing)

    def _features(self, images: Placed | None) -> list[torch.Tensor]:
        """What the tower makes of the images, [F, H] for each level; of a blank one where a rank of several has none.

        All copies of a tower that learns must gather its weights and reduce its gradient in the same order.
        """
        if images is not None:
            vision, pixels = images.reader.vision, images.reader.pixels(images.hashes, images.sizes)
            device, dtype = images.tokens.device, self.config.params_dtype
            patches = torch.cat([patchify(torch.from_numpy(image).to(device), vision).to(dtype) for image in pixels])
            grid = patch_grid(images.sizes, vision)
        elif self._train_vision:
            patches, grid = _blank(self.visual.config)
        else:
            return []
        with torch.set_grad_enabled(self._train_vision and torch.is_grad_enabled()):
            return tower_features(self.visual, patches, grid)

    def _placed(
        self, hidden: torch.Tensor, images: Placed | None, features: list[torch.Tensor]
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Embeddings [T, 1, H] with features in the place of placeholders, and the features that layers add."""
        if images is None:
            for blank in features:  # a gradient of zero for the tower
                hidden = hidden + 0.0 * blank.sum()
            return hidden, ()
        first, *levels = features
        hidden = hidden.index_copy(0, images.tokens, first.index_select(0, images.features).unsqueeze(1))
        if not first.requires_grad:
            return hidden, tuple(levels)
        leaves = tuple(level.detach().requires_grad_() for level in levels)
        return _GiveBack.apply(hidden, leaves, *levels), leaves


def _blank(config: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches and grid of the smallest image that a tower with transformers' ``config`` can read."""
    merge = config.spatial_merge_size
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return torch.zeros(merge * merge, values), torch.tensor([[1, merge, merge]])


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
