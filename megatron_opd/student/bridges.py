"""Model families that mbridge does not know by name, or not as we need them."""

from __future__ import annotations

from typing import Any

import torch
from mbridge.core import Bridge, register_model
from mbridge.models.llama import LLaMABridge
from mbridge.models.qwen2 import Qwen2Bridge
from mbridge.models.qwen3 import Qwen3Bridge

from megatron_opd.student.vision.families import FAMILIES, Family

_TOWER = "visual."  # of the vision tower's parameters in the model


class MistralBridge(LLaMABridge):
    """Mistral's weights have Llama's names and shapes; its sliding window is refused in ``sizes`` where it matters."""


class _VisionBridge:
    """The bridge of a text model, for one with a vision tower whose weights keep transformers' names and shapes.

    ``hf_config`` is that of the language model.
    """

    family: Family
    hf_config: Any

    def __init__(self, hf_config: Any, **options: Any) -> None:
        text = hf_config.get_text_config()
        text.tie_word_embeddings = hf_config.tie_word_embeddings
        self.vision_config = hf_config.vision_config
        super().__init__(text, **options)

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        if name.startswith(_TOWER):
            return [self.family.vision_prefix + name.removeprefix(_TOWER)]
        found = super()._weight_name_mapping_mcore_to_hf(name)
        return [
            self.family.text_prefix + other.removeprefix("model.") if other.startswith("model.") else other
            for other in found
        ]

    def _weight_split_across_tp(
        self, name: str, weight: torch.Tensor, parameter: torch.Tensor, ranks: int
    ) -> list[torch.Tensor]:
        if name.startswith(_TOWER):  # whole on each rank
            return [weight] * ranks
        return super()._weight_split_across_tp(name, weight, parameter, ranks)


class Qwen25VLBridge(_VisionBridge, Qwen2Bridge):
    """Qwen2.5-VL, whose language model is a Qwen2."""

    family = FAMILIES["qwen2_5_vl"]


class Qwen3VLBridge(_VisionBridge, Qwen3Bridge):
    """Qwen3-VL, whose language model is a Qwen3."""

    family = FAMILIES["qwen3_vl"]


def sees(bridge: Bridge) -> bool:
    """Whether it is the bridge of a multimodal model."""
    return isinstance(bridge, _VisionBridge)


def register() -> None:
    """Make mbridge's AutoBridge know them."""
    register_model("mistral")(MistralBridge)
    register_model("qwen2_5_vl")(Qwen25VLBridge)
    register_model("qwen3_vl")(Qwen3VLBridge)
