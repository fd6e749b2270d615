"""The weights of a multimodal model's tower as its Hugging Face folder has them. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_opd.errors import ModelError
from megatron_opd.student.vision.families import FAMILIES
from megatron_opd.student.vision_sizes import deepstack_levels, tower_size

Shapes = dict[str, tuple[int, ...]]


def tower_shapes(folder: Path, hf_config: dict[str, Any]) -> Shapes:
    """Name and shape of every weight of the tower that config.json of ``folder`` describes. Raises ModelError."""

    def size(field: str) -> int:
        return tower_size(folder, hf_config, field)

    kind, hidden, patch = hf_config["model_type"], size("hidden_size"), size("patch_size")
    merged, output = hidden * size("spatial_merge_size") ** 2, size("out_hidden_size")
    found: Shapes = {"patch_embed.proj.weight": (hidden, 3, size("temporal_patch_size"), patch, patch)}
    if kind == "qwen3_vl":
        found |= {"patch_embed.proj.bias": (hidden,), "pos_embed.weight": (size("num_position_embeddings"), hidden)}
    for block in range(size("depth")):
        found |= _under(f"blocks.{block}.", _block(kind, hidden, size("intermediate_size")))
    if kind == "qwen3_vl":
        fold = _linear("linear_fc1", merged, merged) | _linear("linear_fc2", output, merged)
        found |= _under("merger.", _norm("norm", hidden) | fold)
        for level in range(deepstack_levels(hf_config)):
            found |= _under(f"deepstack_merger_list.{level}.", _norm("norm", merged) | fold)
    else:
        fold = _linear("mlp.0", merged, merged) | _linear("mlp.2", output, merged)
        found |= _under("merger.", {"ln_q.weight": (hidden,)} | fold)
    return _under(FAMILIES[kind].vision_prefix, found)


def other_names(folder: Path, hf_config: dict[str, Any], names: Iterable[str]) -> ModelError | None:
    """What is wrong when the weights of a multimodal model have the names of another family's.

    transformers reads and writes Qwen2.5-VL under those of Qwen3-VL too, which are those of its modules. SGLang does
    not read them, and a refresh has to send what it reads.
    """
    ours = FAMILIES.get(hf_config.get("model_type", ""))
    others = [other for other in FAMILIES.values() if other != ours] if ours else []
    for other in others:
        for name in names:
            if name.startswith(other.vision_prefix):
                return ModelError(
                    "The weights have other names than those that the family is published under",
                    where=folder.absolute(),
                    got=name,
                    expected=f"{ours.vision_prefix}... for the tower, {ours.text_prefix}... for the language model",
                    fix="take it as it was published, or write its files anew with other names of weights: "
                    f"{ours.vision_prefix} for {other.vision_prefix} and {ours.text_prefix} for {other.text_prefix}",
                )
    return None


def _block(kind: str, hidden: int, units: int) -> Shapes:
    attention = _linear("attn.qkv", 3 * hidden, hidden) | _linear("attn.proj", hidden, hidden)
    if kind == "qwen3_vl":
        norms = _norm("norm1", hidden) | _norm("norm2", hidden)
        return norms | attention | _linear("mlp.linear_fc1", units, hidden) | _linear("mlp.linear_fc2", hidden, units)
    norms = {"norm1.weight": (hidden,), "norm2.weight": (hidden,)}
    gated = _linear("mlp.gate_proj", units, hidden) | _linear("mlp.up_proj", units, hidden)
    return norms | attention | gated | _linear("mlp.down_proj", hidden, units)


def _linear(name: str, outputs: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def _norm(name: str, size: int) -> Shapes:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}
