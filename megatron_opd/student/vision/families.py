"""Families of multimodal models that the student can be. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Family:
    """What one ``model_type`` is built of, and how its checkpoints name it."""

    tower: str  # transformers' class of the vision tower
    tower_module: str  # where in transformers it is
    text_prefix: str  # of the language model's weights in a checkpoint, where a text model's are "model."
    vision_prefix: str  # of the vision tower's weights
    interleaved: bool  # whether t, h and w take turns in the rotary embedding, or have a section each


FAMILIES = {
    "qwen2_5_vl": Family(
        tower="Qwen2_5_VisionTransformerPretrainedModel",
        tower_module="transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        text_prefix="model.",
        vision_prefix="visual.",
        interleaved=False,
    ),
    "qwen3_vl": Family(
        tower="Qwen3VLVisionModel",
        tower_module="transformers.models.qwen3_vl.modeling_qwen3_vl",
        text_prefix="model.language_model.",
        vision_prefix="model.visual.",
        interleaved=True,
    ),
}
