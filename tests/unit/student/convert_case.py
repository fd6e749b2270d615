"""What conversion is tested on: every family, and layouts that cut it in every way."""

from __future__ import annotations

from pathlib import Path

import torch
from student_case import EXPERTS, VOCAB, make_model

LAYOUTS = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "experts_one": {},
    "experts_ep2": {"expert_parallel": 2},
    "experts_tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "experts_tp2_ep2_etp1": {"tensor_parallel": 2, "expert_parallel": 2, "expert_tensor_parallel": 1},
}
RUN_LAYOUT = {"pipeline_parallel": 2, "virtual_pipeline": 2}

# Heads are twice as wide as hidden / heads in all but llama and qwen2; qwen2 has biases, qwen3 norms of heads.
DENSE = {
    "llama": {},
    "llama_tied": {"tie_word_embeddings": True, "head_dim": 16},
    "mistral": {},
    "qwen2": {},
    "qwen2_tied": {"tie_word_embeddings": True},
    "untied": {},
    "tied": {},
    "half": {},
}
# Not converted, but what a checkpoint of "untied" is taken for.
WRONG = {"short": {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}, "wide": {"vocab_size": VOCAB + 8}}


def make_models(folder: Path) -> None:
    """One folder for each kind, in bfloat16 where it is called half."""
    for kind, changes in (DENSE | {kind: {} for kind in EXPERTS} | WRONG).items():
        family = "untied" if kind in WRONG or kind == "half" else kind.removesuffix("_tied")
        dtype = torch.bfloat16 if kind == "half" else torch.float32
        make_model(folder / kind, family, dtype, **changes)


def kinds_of(layout: str) -> list[str]:
    """Models that are converted under a layout."""
    return list(EXPERTS if layout.startswith("experts") else DENSE)


def sources_of(layout: str) -> list[str]:
    """Layouts whose checkpoints are exported under this one: its own, and the two before it."""
    names = [name for name in LAYOUTS if kinds_of(name) == kinds_of(layout)]
    place = names.index(layout)
    return [names[place], names[place - 1], names[place - 2]]


CASES = [(kind, source, layout) for layout in LAYOUTS for source in sources_of(layout) for kind in kinds_of(layout)]
