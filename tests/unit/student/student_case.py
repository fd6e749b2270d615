"""What the student is tested on: tiny random models, samples, and a plain single-process reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

from megatron_opd.config import Config, LossConfig, parse_config
from megatron_opd.records import PackedBatch

TOP = 3  # rows of the teacher's most likely tokens
VOCAB = 515  # odd: two tensor-parallel ranks need a padded column
CLIP_LOW, CLIP_HIGH = 0.2, 0.28
OPTIMIZER = {"lr": 1e-2, "clip_grad": 0.0, "weight_decay": 0.1, "adam_eps": 1e-3}
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 5000.0,
}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
MODELS = {
    "untied": lambda: Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**_SIZES, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**{**_SIZES, "rope_parameters": _LLAMA3}, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**_SIZES, head_dim=16, sliding_window=None, tie_word_embeddings=False),
    "tied": lambda: Qwen3Config(**_SIZES, head_dim=16, tie_word_embeddings=True),
}
SCORED_ONLY = ("qwen2", "llama", "mistral")  # whose training is that of the others
_EXPERTS = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "router_aux_loss_coef": 0.0,
}
EXPERTS = {
    "experts": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=True, tie_word_embeddings=False),
    "tied_experts": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, norm_topk_prob=False, tie_word_embeddings=True),
}


LAYOUTS = {
    "tp1": {},
    "tp2": {"tensor_parallel": 2},
    "tp2_sequence": {"tensor_parallel": 2, "sequence_parallel": True},
    "dp2": {"data_parallel": 2},
    "dp2_overlap": {"data_parallel": 2, "overlap_gradients": True, "overlap_parameters": True},
    "pp2": {"pipeline_parallel": 2},
    "pp2_virtual2": {"pipeline_parallel": 2, "virtual_pipeline": 2, "recompute": "full"},
    "cp2": {"context_parallel": 2, "recompute": "selective"},
    "pp2_cp2": {"pipeline_parallel": 2, "context_parallel": 2},
    "tp2_pp2": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "tp2_cp2": {"tensor_parallel": 2, "sequence_parallel": True, "context_parallel": 2},
    "dp2_tp2": {"data_parallel": 2, "tensor_parallel": 2},
    "dp2_pp2_overlap": {
        **{"data_parallel": 2, "pipeline_parallel": 2, "virtual_pipeline": 2},
        **{"overlap_gradients": True, "overlap_parameters": True},
    },
    "experts_1": {},
    "experts_dp2": {"data_parallel": 2},
    "experts_ep2": {"data_parallel": 2, "expert_parallel": 2},
    "experts_cp2_ep2": {"context_parallel": 2, "expert_parallel": 2, "recompute": "full"},
    "experts_tp2": {"tensor_parallel": 2, "sequence_parallel": True},
    "experts_ep2_tp2": {
        **{"data_parallel": 2, "expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        **{"overlap_gradients": True, "overlap_parameters": True},
    },
    "experts_ep2_tp2_etp1": {
        **{"data_parallel": 2, "expert_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        **{"expert_tensor_parallel": 1},
    },
    "experts_ep2_pp2": {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2},
}


def kinds_of(layout: str) -> list[str]:
    """Models that are tried under a layout; the first one in all respects."""
    if layout.startswith("experts"):
        return list(EXPERTS) if "pp2" in layout else ["experts"]
    return list(MODELS)


@dataclass(frozen=True)
class Sample:
    """One sequence of L tokens; entry t of the arrays belongs to position t, which predicts token t + 1."""

    tokens: np.ndarray  # [L]
    advantages: np.ndarray  # [L]
    behaviour: np.ndarray  # [L]
    weights: np.ndarray  # [L]
    lags: np.ndarray  # [L]
    slopes: np.ndarray  # [L]
    forward_weights: np.ndarray  # [L]
    top_ids: np.ndarray  # [L, K], one of them may be the next token itself
    top_logprobs: np.ndarray  # [L, K], of a teacher


def make_model(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Save a random model whose norms and biases are not the identity, so that a lost one shows.

    changes: fields of its config.
    """
    torch.manual_seed(0)
    config = (MODELS | EXPERTS)[kind]()
    config = config.from_dict(config.to_dict() | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate.weight"):
            parameter.data.mul_(50)  # a router in doubt would choose by rounding errors
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            parameter.data.mul_(20)  # its scaled angles are small: attention must hang on them
        if parameter.ndim == 1:
            parameter.data.uniform_(0.5, 1.5) if "norm" in name else parameter.data.normal_()
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def make_config(folder: Path, steps: int = 10, **student: Any) -> Config:
    plain = {
        "name": "test",
        "steps": steps,
        "student": {"model": str(folder), "device": "cpu", **student},
        "optimizer": OPTIMIZER,
        "teachers": {"math": {"model": "teacher"}},
        "data": {"train": "train.jsonl"},
    }
    return parse_config(plain, where="test")


def make_samples(model: torch.nn.Module) -> list[Sample]:
    """Five samples of different lengths whose ratios fall below, between and above the bounds.

    The second was drawn by older weights, the fourth by older ones up to its middle.
    """
    generator = np.random.default_rng(1)
    samples = []
    for length in (7, 12, 5, 9, 16):
        tokens = generator.integers(0, VOCAB, length)
        tokens[-2] = VOCAB - 1  # the last real column, beside the padding
        change = generator.uniform(-0.5, 0.5, length)
        with torch.no_grad():
            current = next_logprobs(model, tokens).numpy()
        weights = generator.uniform(0.1, 1.0, length)
        weights[: length // 3] = 0.0  # the prompt
        weights[-1] = 0.0
        advantages = generator.normal(size=length)
        top_ids = np.array([generator.permutation(VOCAB)[:TOP] for _ in tokens])
        top_ids[:-1, 0] = tokens[1:]
        top_logprobs = np.log(generator.dirichlet(np.ones(TOP + 1), length)[:, :TOP])
        forward_weights = np.where(generator.random(length) < 0.5, 0.3 * weights, 0.0)  # a gate, and a coefficient
        lags = np.where(np.arange(length) < {12: 12, 9: 6}.get(length, 0), 2, 0)
        slopes = generator.uniform(0.0, 2.0, length)
        behaviour = np.append(current, 0.0) - np.where(lags, 2 * change, change)
        samples.append(
            Sample(tokens, advantages, behaviour, weights, lags, slopes, forward_weights, top_ids, top_logprobs)
        )
    return samples


NO_IMAGES = {
    "image_hashes": np.empty((0, 32), np.uint8),
    "image_sizes": np.empty((0, 2), np.int64),
    "image_starts": np.empty(0, np.int64),
}


def pack(samples: list[Sample], rows: list[list[int]], denominator: float) -> PackedBatch:
    """One rank's batch: ``rows`` lists the samples of each row. What weighs nothing is not a number."""
    order = [samples[index] for row in rows for index in row]

    def join(arrays: list[np.ndarray], dtype: type, *columns: int) -> np.ndarray:
        return np.concatenate([*arrays, np.empty((0, *columns))]).astype(dtype)

    return PackedBatch(
        version=3,
        last=False,
        paused=False,
        denominator=denominator,
        tokens=join([sample.tokens for sample in order], np.int64),
        labels=join([np.append(sample.tokens[1:], 0) for sample in order], np.int64),
        advantages=join([np.where(sample.weights, sample.advantages, np.nan) for sample in order], np.float32),
        behaviour_logprobs=join([np.where(sample.weights, sample.behaviour, -np.inf) for sample in order], np.float32),
        weights=join([sample.weights for sample in order], np.float32),
        lags=join([sample.lags for sample in order], np.int32),
        slopes=join([np.where(sample.weights, sample.slopes, np.inf) for sample in order], np.float32),
        forward_weights=join([sample.forward_weights for sample in order], np.float32),
        top_ids=join([sample.top_ids for sample in order], np.int64, TOP),
        top_logprobs=join(
            [np.where(s.forward_weights[:, None], s.top_logprobs, np.nan) for s in order], np.float32, TOP
        ),
        row_offsets=np.cumsum([0, *(sum(len(samples[index].tokens) for index in row) for row in rows)]),
        sequence_offsets=np.cumsum([0, *(len(sample.tokens) for sample in order)]),
        **NO_IMAGES,
    )


def denominator_of(samples: list[Sample]) -> float:
    return float(sum(sample.weights.sum() for sample in samples))


def all_logprobs(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    """[L] -> [L - 1, VOCAB]."""
    return torch.log_softmax(model(torch.from_numpy(tokens)[None]).logits[0, :-1].float(), -1)


def next_logprobs(model: torch.nn.Module, tokens: np.ndarray) -> torch.Tensor:
    """[L] -> [L - 1]."""
    return all_logprobs(model, tokens).gather(1, torch.from_numpy(tokens)[1:, None])[:, 0]


def slow_forward_kl(logprobs: torch.Tensor, ids: np.ndarray, teacher: np.ndarray) -> torch.Tensor:
    """KL of the teacher's top tokens and the rest against one position's log-probs [VOCAB]."""
    total, rest, student_rest = torch.zeros(()), 1.0, torch.ones(())
    for token, logprob in zip(ids.tolist(), teacher.tolist(), strict=True):
        total = total + math.exp(logprob) * (logprob - logprobs[token])
        rest, student_rest = rest - math.exp(logprob), student_rest - logprobs[token].exp()
    return total + rest * (math.log(rest) - student_rest.log())


def slow_token_loss(current: Any, behaviour: float, advantage: float) -> Any:
    """The surrogate of one token, case by case; ``current`` is a number or a tensor with a gradient."""
    ratio = math.e ** (current - behaviour)
    if advantage >= 0:
        return -advantage * (ratio if ratio < 1 + CLIP_HIGH else 1 + CLIP_HIGH)
    return -advantage * (ratio if ratio > 1 - CLIP_LOW else 1 - CLIP_LOW)


def slow_stale_loss(current: torch.Tensor, behaviour: float, advantage: float, slope: float) -> torch.Tensor:
    """The surrogate of a token that older weights drew: a constant times its log-prob, shifted to the loss's value."""
    now = float(current)
    factor = min(math.exp(now - behaviour), LossConfig().importance_cap) * (advantage - slope * (now - behaviour))
    return -factor * (current - now + 1)


def slow_reference(folder: Path, samples: list[Sample]) -> dict[str, Any]:
    """Loss, gradients and weights after one AdamW step, one sample and one token at a time."""
    return slow_step(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), samples)


def slow_step(model: Any, samples: list[Sample]) -> dict[str, Any]:
    """The same for a model that is there."""
    loss = torch.zeros(())
    for sample in samples:
        for position, row in enumerate(all_logprobs(model, sample.tokens)):
            current = row[sample.tokens[position + 1]]
            behaviour, advantage = sample.behaviour[position], sample.advantages[position]
            if sample.lags[position]:
                token_loss = slow_stale_loss(current, behaviour, advantage, sample.slopes[position])
            else:
                token_loss = slow_token_loss(current, behaviour, advantage)
            forward = slow_forward_kl(row, sample.top_ids[position], sample.top_logprobs[position])
            loss = loss + sample.weights[position] * token_loss + sample.forward_weights[position] * forward
    loss = loss / denominator_of(samples)
    loss.backward()
    gradients = as_saved({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": OPTIMIZER["weight_decay"]}, {"params": vectors, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=OPTIMIZER["lr"], betas=(0.9, 0.98), eps=OPTIMIZER["adam_eps"]).step()
    weights = as_saved({name: parameter.detach() for name, parameter in model.named_parameters()})
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    return {"loss": loss.item(), "grad_norm": norm, "gradients": gradients, "weights": weights}


def as_saved(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a model under the names of its files: transformers joins the experts of a layer in memory."""
    saved = {}
    for name, tensor in tensors.items():
        layer, _, joined = name.rpartition(".experts.")
        if not layer:
            saved[name] = tensor
            continue
        for number, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if joined == "gate_up_proj" else [matrix]
            names = ["gate_proj", "up_proj"] if joined == "gate_up_proj" else ["down_proj"]
            saved |= {f"{layer}.experts.{number}.{kind}.weight": part for kind, part in zip(names, parts, strict=True)}
    return saved
