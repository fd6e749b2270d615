"""Sizes of a decoder from its config.json: parameters, and operations of a forward pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_opd.config import StudentConfig
from megatron_opd.errors import ModelError
from megatron_opd.runtime.vision import text_config
from megatron_opd.student.sizes import has_experts, read_hf_config
from megatron_opd.student.vision_sizes import VISION_TYPES, tower_size
from megatron_opd.student.vision_weights import tower_shapes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The sizes that decide memory and operations of a llama-like decoder, dense or a mixture of experts."""

    name: str  # of the folder
    layers: int
    hidden: int
    heads: int  # of queries
    kv_heads: int
    head_size: int
    vocab: int
    ffn: int  # units of a dense layer's gate; with experts, of one expert
    experts: int  # 0: a dense model
    experts_per_token: int  # 1 in a dense model
    tied: bool  # whether the embedding is the output matrix too
    head_norms: bool  # RMSNorm of queries and keys
    qkv_bias: bool
    tower_params: int = 0  # of the vision tower; 0: a text model
    tower_entries: int = 0  # of its matrices, those of a patch as often as an image token has patches

    @property
    def query_width(self) -> int:
        """Width of all queries of a token."""
        return self.heads * self.head_size

    @property
    def qkv_width(self) -> int:
        """Width of queries, keys and values of a token."""
        return (self.heads + 2 * self.kv_heads) * self.head_size

    @property
    def expert_copies(self) -> int:
        """Feed-forward blocks of a layer."""
        return max(self.experts, 1)

    @property
    def attention_params(self) -> int:
        """Matrices of one layer's attention."""
        return self.hidden * (self.qkv_width + self.query_width)

    @property
    def ffn_params(self) -> int:
        """Matrices of one feed-forward block: gate, up and down."""
        return 3 * self.hidden * self.ffn

    @property
    def vector_params(self) -> int:
        """What every rank of a layer has whole: norms, and the router of a mixture of experts."""
        norms = 2 * self.hidden + (2 * self.head_size if self.head_norms else 0)
        return norms + self.hidden * self.experts

    @property
    def layer_params(self) -> int:
        """All of one layer."""
        bias = self.qkv_width if self.qkv_bias else 0
        return self.attention_params + bias + self.vector_params + self.expert_copies * self.ffn_params

    @property
    def params(self) -> int:
        """All of the model."""
        tables = self.vocab * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * self.layer_params + self.hidden + self.tower_params

    @property
    def body_params(self) -> int:
        """Matrix entries that each token is multiplied with, without the output matrix."""
        ffn = self.experts_per_token * self.ffn_params + self.hidden * self.experts
        return self.layers * (self.attention_params + ffn)

    @property
    def head_params(self) -> int:
        """Entries of the output matrix."""
        return self.vocab * self.hidden

    def served_bytes_read(self, tokens: float, value_bytes: int) -> float:
        """Weights that one pass over ``tokens`` tokens reads: of the experts, those that any of the tokens chooses."""
        chosen = 1 - (1 - self.experts_per_token / self.expert_copies) ** tokens
        ffn = self.expert_copies * chosen * self.ffn_params
        return value_bytes * (self.layers * (self.attention_params + ffn) + self.head_params)

    def kv_bytes(self, value_bytes: int) -> int:
        """Keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_size * value_bytes

    def attention_flops(self, squared_length: float) -> float:
        """Forward operations of causal attention over a sequence whose length, squared, is ``squared_length``."""
        return 2.0 * self.layers * self.query_width * squared_length

    def sent_by(self, student: StudentConfig) -> ModelShape:
        """What a refresh sends of it: a tower that does not learn stays at home."""
        return self if student.train_vision else replace(self, tower_params=0)

    def tower_flops(self, image_tokens: float) -> float:
        """Forward operations of the vision tower's matrices; its attention, short beside them, is left out."""
        return 2.0 * self.tower_entries * image_tokens


def read_shape(folder: Path, key: str) -> ModelShape:
    """Sizes of the model in ``folder``; ``key``: the config key that names it, for errors. Raises ModelError."""
    try:
        plain = read_hf_config(folder)
    except ModelError as error:
        error.fix = f"a plan needs config.json only: set {key} to a folder that has it (conf/plan/models has some)"
        raise
    return shape_of(plain, folder)


def shape_of(plain: dict[str, Any], folder: Path) -> ModelShape:
    """Sizes in a parsed config.json. Raises ModelError for one that is missing."""
    text = text_config(plain)

    def size(*fields: str) -> int:
        found = next((text[field] for field in fields if isinstance(text.get(field), int)), 0)
        if found < 1:
            raise ModelError(
                "The model's config.json lacks a size",
                where=f"{folder / 'config.json'}: {fields[0]}",
                got=text.get(fields[0]),
                expected="a positive whole number",
            )
        return found

    experts = has_experts(plain)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kind = str(plain.get("model_type"))
    tower_params, tower_entries = _tower(plain, folder) if kind in VISION_TYPES else (0, 0)
    return ModelShape(
        name=folder.name,
        layers=size("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_size=text.get("head_dim") or hidden // heads,
        vocab=size("vocab_size"),
        ffn=size("moe_intermediate_size") if experts else size("intermediate_size"),
        experts=size("num_experts", "num_local_experts") if experts else 0,
        experts_per_token=size("num_experts_per_tok") if experts else 1,
        tied=bool(plain.get("tie_word_embeddings", False)),
        head_norms=kind.startswith("qwen3"),
        qkv_bias=kind in ("qwen2", "qwen2_5_vl"),
        tower_params=tower_params,
        tower_entries=tower_entries,
    )


def _tower(plain: dict[str, Any], folder: Path) -> tuple[int, int]:
    """Parameters of the vision tower, and the entries that one image token is multiplied with."""
    shapes = tower_shapes(folder, plain)
    patches = tower_size(folder, plain, "spatial_merge_size") ** 2
    matrices = {name: math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and "pos_embed" not in name}
    entries = sum(size * (1 if "merger" in name else patches) for name, size in matrices.items())
    return sum(map(math.prod, shapes.values())), entries
