"""Checks of a multimodal model's sizes: its rotary sections, its tower, and how both fit the ranks. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.config import StudentConfig
from megatron_opd.errors import ConfigError, ModelError, OpdError
from megatron_opd.runtime.vision import text_config
from megatron_opd.student.vision.families import FAMILIES

VISION_TYPES = tuple(FAMILIES)

_COLOURS = 3
_SECTIONS = 3  # rotary frequencies of time, height and width
_TOWER_SIZES = (
    *("depth", "hidden_size", "intermediate_size", "num_heads", "out_hidden_size"),
    *("patch_size", "spatial_merge_size", "temporal_patch_size"),
)
_OWN_SIZES = {"qwen2_5_vl": ("window_size",), "qwen3_vl": ("num_position_embeddings",)}
_LEVELS = {"qwen2_5_vl": "fullatt_block_indexes", "qwen3_vl": "deepstack_visual_indexes"}


def has_tower(hf_config: dict[str, Any]) -> bool:
    """Whether the model of a config.json reads images."""
    return isinstance(hf_config.get("vision_config"), dict)


def tower_size(model: Path, hf_config: dict[str, Any], field: str) -> int:
    """A size out of vision_config of the config.json of the folder ``model``. Raises ModelError when it has none."""
    size = hf_config["vision_config"].get(field)
    if not isinstance(size, int) or size < 1:
        raise _mistake(model, f"vision_config.{field}", size, "a positive whole number")
    return size


def deepstack_levels(hf_config: dict[str, Any]) -> int:
    """Decoder layers, from the first on, to whose output the tower adds features of its own."""
    return len(hf_config.get("vision_config", {}).get("deepstack_visual_indexes", ()))


def check_vision(model: Path, hf_config: dict[str, Any]) -> None:
    """Raise ModelError unless the multimodal model of a config.json is one we build; ``sizes`` checks its text part."""
    if not has_tower(hf_config):
        raise _mistake(model, "vision_config", hf_config.get("vision_config"), "the sizes of the model's vision tower")
    _check_tie(model, hf_config)
    _check_sections(model, hf_config)
    _check_tower(model, hf_config)
    vocab = text_config(hf_config).get("vocab_size")
    for field in ("image_token_id", "vision_start_token_id", "vision_end_token_id"):
        token = hf_config.get(field)
        if not isinstance(token, int) or (isinstance(vocab, int) and not 0 <= token < vocab):
            raise _mistake(model, field, token, f"a token id below vocab_size = {vocab}")


def vision_mistakes(student: StudentConfig, hf_config: dict[str, Any]) -> Iterator[OpdError]:
    """What ``student`` asks of a model that can be built, and that its tower, or the lack of one, does not allow."""
    if student.train_vision and not has_tower(hf_config):
        yield ConfigError(
            "A model without a vision tower cannot train one",
            where="student.train_vision",
            got=f"true for a {hf_config.get('model_type')}",
            fix="set student.train_vision to false, or student.model to a multimodal model",
        )
    levels, parts = deepstack_levels(hf_config), student.pipeline_parallel * student.virtual_pipeline
    layers = text_config(hf_config).get("num_hidden_layers", 0)
    if levels > layers // parts:
        yield ConfigError(
            "The layers to which the vision tower adds its features are not all on the first pipeline stage",
            where="student.pipeline_parallel, student.virtual_pipeline",
            got=f"{layers} layers in {parts} parts",
            expected=f"at least {levels} layers in a part: vision_config.deepstack_visual_indexes has {levels}",
            fix="lower one of the two",
        )


def _check_tie(model: Path, hf_config: dict[str, Any]) -> None:
    """transformers 4 reads it of the text model, transformers 5 and SGLang of the whole: they must be equal."""
    whole = hf_config.get("tie_word_embeddings", False)
    text = text_config(hf_config).get("tie_word_embeddings", whole)
    if whole != text:
        raise ModelError(
            "config.json contradicts itself on whether the embedding is the output matrix too",
            where=f"{model / 'config.json'}: tie_word_embeddings",
            got=f"{whole}, but {text} in text_config",
            fix="make both true where the weights have no lm_head.weight, and both false where they have it",
        )


def _check_sections(model: Path, hf_config: dict[str, Any]) -> None:
    """Which rotary frequencies turn with time, height and width."""
    text = text_config(hf_config)
    name = "rope_parameters" if text.get("rope_parameters") else "rope_scaling"  # of transformers 5 and 4
    rope = text.get(name) or {}
    field = name if text is hf_config else f"text_config.{name}"
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope") or rope.get("partial_rotary_factor", 1) != 1:
        raise _mistake(model, field, rope, "rope_type default, of whole heads")
    sections = rope.get("mrope_section")
    numbers = isinstance(sections, list) and all(isinstance(size, int) and size > 0 for size in sections)
    if not numbers or len(sections) != _SECTIONS:
        raise _mistake(model, f"{field}.mrope_section", sections, f"{_SECTIONS} positive whole numbers")
    head = text.get("head_dim") or text.get("hidden_size", 0) // (text.get("num_attention_heads") or 1)
    if 2 * sum(sections) != head:
        raise _mistake(model, f"{field}.mrope_section", sections, f"a sum of {head // 2}, half of a head")
    interleaved = FAMILIES[hf_config["model_type"]].interleaved
    if rope.get("mrope_interleaved", interleaved) != interleaved:
        raise _mistake(model, f"{field}.mrope_interleaved", rope["mrope_interleaved"], str(interleaved).lower())


def _check_tower(model: Path, hf_config: dict[str, Any]) -> None:
    kind, tower = hf_config["model_type"], hf_config["vision_config"]
    sizes = {field: tower_size(model, hf_config, field) for field in _TOWER_SIZES + _OWN_SIZES[kind]}
    hidden = text_config(hf_config).get("hidden_size", sizes["out_hidden_size"])
    rules = [
        ("in_channels", tower.get("in_channels", tower.get("in_chans", _COLOURS)), _COLOURS),
        ("out_hidden_size", sizes["out_hidden_size"], hidden),
    ]
    for field, found, expected in rules:
        if found != expected:
            raise _mistake(model, f"vision_config.{field}", found, expected)
    if sizes["hidden_size"] % sizes["num_heads"]:
        expected = f"a multiple of num_heads = {sizes['num_heads']}"
        raise _mistake(model, "vision_config.hidden_size", sizes["hidden_size"], expected)
    grid = sizes.get("num_position_embeddings", 1)
    if math.isqrt(grid) ** 2 != grid:
        raise _mistake(model, "vision_config.num_position_embeddings", grid, "a square number")
    levels, depth = tower.get(_LEVELS[kind]), sizes["depth"]
    if not isinstance(levels, list) or levels != [block for block in range(depth) if block in levels]:
        raise _mistake(model, f"vision_config.{_LEVELS[kind]}", levels, f"ascending numbers of blocks, below {depth}")


def _mistake(model: Path, field: str, got: object, expected: object) -> ModelError:
    return ModelError(
        "The student's config.json describes a multimodal model that is not supported",
        where=f"{model / 'config.json'}: {field}",
        got=got,
        expected=expected,
    )
