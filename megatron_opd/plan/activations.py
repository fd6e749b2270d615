"""What the forward pass keeps for the backward pass, tensor by tensor.

Two lists, because two sets of layers exist: Transformer Engine's, with fused norms, rotary embedding, SwiGLU and flash
attention, and our plain torch layers, which keep more. The second is what a CPU can measure (tools/plan_check.py); the
first follows from which kernels are fused. Bytes are those of one rank for one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_opd.config import StudentConfig
from megatron_opd.plan.shape import ModelShape

Backend = Literal["transformer_engine", "torch"]
FLOAT = 4
VALUE_BYTES = {"float32": 4, "bfloat16": 2}
ROUTING_BYTES = 40  # of a token with experts: chosen ids, their probabilities and places, beside the map


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A packed row: its tokens, and the sum of the squared lengths of its sequences."""

    tokens: float
    squares: float
    expert_imbalance: float = 1.0  # tokens that reach the busiest rank's experts, of the mean


def backend_of(student: StudentConfig) -> Backend:
    """The layers that the config means; a plan is for GPUs unless it says otherwise."""
    return "torch" if student.backend == "torch" or student.device == "cpu" else "transformer_engine"


def layer_bytes(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> dict[str, float]:
    """What one layer keeps of a row, by part, without recomputation."""
    value, torch = VALUE_BYTES[student.dtype], backend_of(student) == "torch"
    whole = row.tokens / student.context_parallel  # tokens between matrices, on one rank
    held = whole / student.tensor_parallel if student.sequence_parallel else whole
    # An RMSNorm of plain torch keeps its input and the normed one in float32, as well as what the matrix takes.
    norm = held * shape.hidden * ((2 * FLOAT if torch else value) + value)
    return {
        "norms": 2 * norm,
        "attention": _attention(shape, student, row, whole),
        "feed-forward": _experts(shape, student, row, whole) if shape.experts else _dense(shape, student, whole),
    }


def kept_bytes(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """What one layer keeps until its backward pass, under the chosen recomputation."""
    if student.recompute == "full":
        return layer_input(shape, student, row)
    return sum(layer_bytes(shape, student, row).values()) - recomputed_bytes(shape, student, row)


def recomputed_bytes(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """What one layer keeps only while its own backward pass runs."""
    if student.recompute == "none":
        return 0.0
    if student.recompute == "full":
        return sum(layer_bytes(shape, student, row).values()) - layer_input(shape, student, row)
    return _attention_scores(shape, student, row, row.tokens / student.context_parallel)


def layer_input(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """The hidden states that enter a layer."""
    tokens = row.tokens / student.context_parallel
    tokens /= student.tensor_parallel if student.sequence_parallel else 1
    return tokens * shape.hidden * VALUE_BYTES[student.dtype]


def expert_tokens(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """Tokens that reach the experts of a rank, each as often as it chooses one of them."""
    own = row.tokens / student.context_parallel / (student.tensor_parallel if student.sequence_parallel else 1)
    return own * shape.experts_per_token * student.expert_tensor * row.expert_imbalance


def head_bytes(shape: ModelShape, student: StudentConfig, row: MicroBatch, top_k: int) -> float:
    """The last norm, the gradients that the fused loss makes at once, and its numbers of each token.

    The gradients are those of the hidden states and of the output matrix: they wait for the backward pass.
    """
    torch, value = backend_of(student) == "torch", VALUE_BYTES[student.dtype]
    hidden = layer_input(shape, student, row)
    norm = hidden * (2 * FLOAT / value if torch else 1)
    matrix = value * shape.hidden * -(-shape.vocab // student.tensor_parallel)
    return norm + hidden + matrix + row.tokens / student.context_parallel * (64 + 24 * top_k)


def _attention(shape: ModelShape, student: StudentConfig, row: MicroBatch, tokens: float) -> float:
    """From the normed hidden states to the input of the output projection."""
    value, torch, split = VALUE_BYTES[student.dtype], backend_of(student) == "torch", student.tensor_parallel
    query, keys = shape.query_width / split, shape.kv_heads * shape.head_size / split
    kept = value * (query + keys)  # queries and keys after the rotary embedding
    kept += value * (query + 2 * keys)  # the matrix's output, of which the values are a view
    if shape.head_norms:
        kept += 2 * FLOAT * query + FLOAT * keys if torch else value * query
        kept += FLOAT * keys if torch and value < FLOAT else 0
    kept += 4 * value * shape.head_size if torch else 0  # sines and cosines, of queries and of keys
    kept += value * query  # the projection's input, which is flash attention's output too
    return tokens * kept + _attention_scores(shape, student, row, tokens)


def _attention_scores(shape: ModelShape, student: StudentConfig, row: MicroBatch, tokens: float) -> float:
    """What attention itself keeps beside its input: a float for each query and head; plain torch, its output again."""
    kept = FLOAT * shape.heads / student.tensor_parallel * tokens
    if backend_of(student) == "torch":
        value = VALUE_BYTES[student.dtype]
        kept += value * shape.query_width / student.tensor_parallel * tokens
        if student.context_parallel > 1:  # keys and values of all ranks, and a mask of own queries by all keys
            gathered = 2 * value * shape.kv_heads * shape.head_size / student.tensor_parallel
            kept += gathered * row.tokens + (1 + value) * row.squares / student.context_parallel
    return kept


def _dense(shape: ModelShape, student: StudentConfig, tokens: float) -> float:
    """Gate and up, and their product; plain torch keeps the two factors of the product as well."""
    wide = 5 if backend_of(student) == "torch" else 3
    return tokens * wide * shape.ffn / student.tensor_parallel * VALUE_BYTES[student.dtype]


def _experts(shape: ModelShape, student: StudentConfig, row: MicroBatch, tokens: float) -> float:
    """The tokens that reach this rank's experts, and what those keep."""
    value, torch = VALUE_BYTES[student.dtype], backend_of(student) == "torch"
    own = tokens / student.tensor_parallel if student.sequence_parallel else tokens
    arrived = expert_tokens(shape, student, row)
    wide = 6 if torch else 3
    kept = value * (shape.hidden + wide * shape.ffn / student.expert_tensor)
    return arrived * kept + own * (ROUTING_BYTES + (FLOAT + 1) * shape.experts)
