"""One pipeline stage of a multimodal student."""

from __future__ import annotations

from typing import Any

from mbridge.core import Bridge

from megatron_opd.student.vision.model import SeeingModel, seeing
from megatron_opd.student.vision.rotary import Rotary
from megatron_opd.student.vision.tower import build_tower


def build_seeing(bridge: Bridge, train_vision: bool, options: dict[str, Any]) -> SeeingModel:
    """The stage that GPTModel's ``options`` describe, with the tower if it is the first.

    bridge: one of ``bridges`` that has a family.
    """
    tower = None
    if options["pre_process"]:
        tower = build_tower(bridge.family, bridge.vision_config, bridge.dtype, bridge.config.sequence_parallel)
        if bridge.config.recompute_granularity == "full":
            tower.gradient_checkpointing_enable({"use_reentrant": False})
    return SeeingModel(
        **options | {"transformer_layer_spec": seeing(options["transformer_layer_spec"])},
        position_embedding_type="none",
        rotary=_rotary(bridge),
        tower=tower,
        train_vision=train_vision,
    )


def _rotary(bridge: Bridge) -> Rotary:
    """transformers 5 keeps the rotary settings in one field, transformers 4 in two."""
    text = bridge.hf_config
    known = getattr(text, "rope_parameters", None) or {"rope_theta": text.rope_theta, **text.rope_scaling}
    return Rotary(bridge.config.kv_channels, known["rope_theta"], known["mrope_section"], bridge.family.interleaved)
