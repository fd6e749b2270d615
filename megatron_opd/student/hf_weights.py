"""The weights in a Hugging Face folder: which there must be, and whether they are there. Needs no torch.

Everything is known from config.json and from the headers of the safetensors files, before a weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from megatron_opd.errors import ModelError, OpdError
from megatron_opd.runtime.vision import text_config
from megatron_opd.student.sizes import experts_field, has_experts, read_size
from megatron_opd.student.vision.families import FAMILIES
from megatron_opd.student.vision_sizes import has_tower
from megatron_opd.student.vision_weights import other_names, tower_shapes

INDEX = "model.safetensors.index.json"
DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16"}  # those of safetensors, and ours
_QWEN3_HEAD_DIM = 128  # of a config.json that names none, in transformers
_LISTED = 5  # names shown of many


@dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint, as the header of its file tells."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


def expected_shapes(folder: Path, hf_config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight of the model that config.json of ``folder`` describes, layer after layer.

    For the families of ``sizes.MODEL_TYPES``. Raises ModelError when a size is missing.
    """

    def size(field: str) -> int:
        return read_size(folder, hf_config, field)

    hidden, vocab = size("hidden_size"), size("vocab_size")
    model = FAMILIES[hf_config["model_type"]].text_prefix if has_tower(hf_config) else "model."
    found: dict[str, tuple[int, ...]] = {f"{model}embed_tokens.weight": (vocab, hidden)}
    for layer in range(size("num_hidden_layers")):
        prefix = f"{model}layers.{layer}."
        parts = _attention(hf_config, size) | _feed_forward(hf_config, size)
        found |= {prefix + name: shape for name, shape in parts.items()}
    found[f"{model}norm.weight"] = (hidden,)
    if not hf_config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (vocab, hidden)
    return found | (tower_shapes(folder, hf_config) if has_tower(hf_config) else {})


def weight_mistakes(folder: Path, hf_config: dict[str, Any]) -> list[OpdError]:
    """What is wrong with the weight files of ``folder``: missing, cut off, or not those of the model."""
    try:
        found = read_headers(folder)
        if (error := other_names(folder, hf_config, found)) is not None:
            return [error]
        return list(_differences(folder, expected_shapes(folder, hf_config), found))
    except ModelError as error:
        return [error]


def read_headers(folder: Path) -> dict[str, HfTensor]:
    """Every tensor of the checkpoint by name. Raises ModelError when a file is missing or damaged."""
    index = folder / INDEX
    files = _indexed(index) if index.is_file() else {path: None for path in sorted(folder.glob("*.safetensors"))}
    if not files:
        raise ModelError("The checkpoint has no weights", where=folder.absolute(), expected="*.safetensors")
    found: dict[str, HfTensor] = {}
    for path, promised in files.items():
        tensors = _header(path)
        missing = sorted((promised or set()) - set(tensors))
        if missing:
            raise ModelError("A weight file lacks tensors that the index promises", where=path, got=_listing(missing))
        for name in tensors if promised is None else promised:
            if name in found:
                raise ModelError(
                    "Two weight files hold the same tensor", where=path, got=f"{name}, as {found[name].file}"
                )
            found[name] = tensors[name]
    return found


def weights_dtype(folder: Path) -> str:
    """The one precision of all weights, "float32" or "bfloat16". Raises ModelError for another, or a mixture."""
    kinds = sorted({tensor.dtype for tensor in read_headers(folder).values()})
    if len(kinds) == 1 and kinds[0] in DTYPE_NAMES:
        return DTYPE_NAMES[kinds[0]]
    raise ModelError(
        "The precision of the weights cannot be kept",
        where=folder.absolute(),
        got=" and ".join(kinds),
        expected=f"one of {', '.join(DTYPE_NAMES)}",
        fix="give dtype=float32 or dtype=bfloat16 to convert to it",
    )


def _attention(hf_config: dict[str, Any], size: Callable[[str], int]) -> dict[str, tuple[int, ...]]:
    kind, text = hf_config["model_type"], text_config(hf_config)
    hidden, heads = size("hidden_size"), size("num_attention_heads")
    groups = text.get("num_key_value_heads") or heads
    usual = _QWEN3_HEAD_DIM if kind in ("qwen3", "qwen3_vl") and "head_dim" not in text else hidden // heads
    head = text.get("head_dim") or usual
    outputs = {"q_proj": heads * head, "k_proj": groups * head, "v_proj": groups * head}
    found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    found |= {f"self_attn.{name}.weight": (output, hidden) for name, output in outputs.items()}
    found["self_attn.o_proj.weight"] = (hidden, heads * head)
    if kind in ("qwen2", "qwen2_5_vl"):
        found |= {f"self_attn.{name}.bias": (output,) for name, output in outputs.items()}
    if kind.startswith("qwen3"):
        found |= {f"self_attn.{name}.weight": (head,) for name in ("q_norm", "k_norm")}
    return found


def _feed_forward(hf_config: dict[str, Any], size: Callable[[str], int]) -> dict[str, tuple[int, ...]]:
    hidden = size("hidden_size")
    found: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (hidden,)}
    if not has_experts(hf_config):
        return found | _gated("mlp.", hidden, size("intermediate_size"))
    experts = size(experts_field(hf_config))
    found["mlp.gate.weight"] = (experts, hidden)
    for expert in range(experts):
        found |= _gated(f"mlp.experts.{expert}.", hidden, size("moe_intermediate_size"))
    return found


def _gated(prefix: str, hidden: int, units: int) -> dict[str, tuple[int, ...]]:
    shapes = {"gate_proj": (units, hidden), "up_proj": (units, hidden), "down_proj": (hidden, units)}
    return {f"{prefix}{name}.weight": shape for name, shape in shapes.items()}


def _indexed(index: Path) -> dict[Path, set[str]]:
    """Names in each file that the index lists. Raises ModelError when it cannot be read, or a file is not there."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            files.setdefault(index.parent / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("The index of the weights cannot be read", where=index.absolute(), got=repr(error)) from error
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise ModelError(
            "The index names weight files that are not there", where=index.absolute(), got=_listing(missing)
        )
    return files


def _header(path: Path) -> dict[str, HfTensor]:
    """The tensors of one file. safetensors compares the header with the file's size."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: HfTensor(path, tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "A weight file is damaged", where=path.absolute(), got=error, fix="download or convert the model again"
        ) from error


def _differences(
    folder: Path, expected: dict[str, tuple[int, ...]], found: dict[str, HfTensor]
) -> Iterator[ModelError]:
    spare = {"lm_head.weight"} - set(expected)  # a tied one is saved by some tools, and read by none
    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected and name not in spare]
    unknown = [name for name in unknown if not name.endswith("rotary_emb.inv_freq")]  # follows from config.json
    wrong = [
        f"{name} is {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    fix = "the files are incomplete, or config.json is another model's"
    if missing:
        yield ModelError("The checkpoint lacks weights", where=folder.absolute(), got=_listing(missing), fix=fix)
    if unknown:
        what = "The checkpoint has weights that the model of its config.json has not"
        yield ModelError(what, where=folder.absolute(), got=_listing(unknown), fix=fix)
    if wrong:
        what = "Weights have other shapes than config.json says"
        yield ModelError(what, where=folder.absolute(), got=_listing(wrong), fix=fix)


def _listing(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
