"""Memory of each pipeline stage's ranks while training, part by part, in bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from megatron_opd.config import Config, StudentConfig
from megatron_opd.plan.activations import (
    FLOAT,
    VALUE_BYTES,
    MicroBatch,
    backend_of,
    expert_tokens,
    head_bytes,
    kept_bytes,
    layer_input,
    recomputed_bytes,
)
from megatron_opd.plan.shape import ModelShape

GPU_BLOCK = 4096, 8192  # positions and columns of logits that exist at a time: student.fused_logprob.BLOCKS
CPU_BLOCK = 1024, 512
MOMENTS = 2 * FLOAT  # Adam's two, of each parameter


@dataclass(frozen=True, slots=True)
class StageParams:
    """Parameters of one rank of a pipeline stage: dense ones, those of its experts, and those that do not learn."""

    dense: int
    experts: int
    frozen: int

    @property
    def total(self) -> int:
        """All that learn."""
        return self.dense + self.experts


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one rank of one pipeline stage."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # kept for the backward pass, of all micro-batches in flight
    workspace: float  # of the one layer, or the output head, whose backward pass runs
    refresh: float  # while weights leave: when there are neither activations nor workspace

    @property
    def resident(self) -> float:
        """What is there at all times."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> float:
        """Most at any time."""
        return self.resident + max(self.activations + self.workspace, self.refresh)

    def parts(self) -> dict[str, float]:
        """Every part and the peak."""
        return asdict(self) | {"peak": self.peak}


def stage_params(shape: ModelShape, student: StudentConfig, stage: int) -> StageParams:
    """Parameters of each rank of pipeline stage ``stage``."""
    split, last = student.tensor_parallel, student.pipeline_parallel - 1
    layers = shape.layers // student.pipeline_parallel
    bias = shape.qkv_width if shape.qkv_bias else 0
    dense = layers * (shape.vector_params + (shape.attention_params + bias) // split)
    ffn = layers * shape.expert_copies * shape.ffn_params
    dense += 0 if shape.experts else ffn // split
    table = -(-shape.vocab // split) * shape.hidden  # the vocabulary is padded to a multiple of the ranks
    dense += table if stage == 0 else 0
    if stage == last:
        dense += shape.hidden + (0 if shape.tied and last == 0 else table)
    experts = ffn // (student.expert_parallel * student.expert_tensor) if shape.experts else 0
    tower = shape.tower_params if stage == 0 else 0  # whole on every rank of the first stage
    return StageParams(dense + (tower if student.train_vision else 0), experts, 0 if student.train_vision else tower)


def in_flight(student: StudentConfig, stage: int, rows: int) -> float:
    """Most micro-batches whose activations a stage holds at once, in units of the stage's whole part of the layers.

    1F1B: as many as there are stages from this one to the last. Interleaved: Megatron's warm-up in parts of the layers.
    """
    stages, parts = student.pipeline_parallel, student.virtual_pipeline
    if parts == 1:
        return min(rows, stages - stage)
    filled = -(-rows // stages) * stages  # rows that weigh nothing fill up to a multiple of the stages
    warm_up = 2 * (stages - stage - 1) + (parts - 1) * stages
    return min(filled * parts, warm_up + 1) / parts


def stage_memory(config: Config, shape: ModelShape, stage: int, row: MicroBatch, rows: int) -> StageMemory:
    """Memory of each rank of ``stage`` for ``rows`` micro-batches of which the largest is ``row``."""
    student = config.student
    value = VALUE_BYTES[student.dtype]
    params = stage_params(shape, student, stage)
    layers = shape.layers // student.pipeline_parallel
    is_last = stage == student.pipeline_parallel - 1
    # The backward pass begins with the head; when it reaches a layer, what the head kept is gone.
    head = head_bytes(shape, student, row, config.scoring.top_k) if is_last else 0.0
    recomputed = recomputed_bytes(shape, student, row)
    at_head = head + (head_workspace(shape, student, row, config) if is_last else 0.0)
    at_layer = recomputed + layer_workspace(shape, student, row)
    kept = layers * in_flight(student, stage, rows) * kept_bytes(shape, student, row)
    return StageMemory(
        weights=value * (params.total + params.frozen),
        gradients=FLOAT * params.total,
        optimizer=optimizer_bytes(params, student),
        activations=kept + max(head, recomputed),
        workspace=max(at_head, at_layer) - max(head, recomputed),
        refresh=refresh_bytes(config, shape) if stage == 0 else 0.0,
    )


def optimizer_bytes(params: StageParams, student: StudentConfig) -> float:
    """This rank's part of Adam's state, which is split over all ranks with the same parameters."""
    each = MOMENTS + (FLOAT if student.dtype == "bfloat16" else 0)  # a float32 copy of weights that are not
    expert_copies = student.copies * student.tensor_parallel / (student.expert_parallel * student.expert_tensor)
    return each * (params.dense / student.copies + params.experts / expert_copies)


def layer_workspace(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """Gradients that exist while the backward pass of a feed-forward block runs: of its tensors, and of one matrix."""
    value = VALUE_BYTES[student.dtype]
    split = student.expert_tensor if shape.experts else student.tensor_parallel
    tokens = expert_tokens(shape, student, row) if shape.experts else row.tokens / student.context_parallel
    # Experts' outputs are weighted, and their gradients are copied before and after they travel.
    wide, copies = (4, 3) if shape.experts else (3, 1)
    by_tensors = value * tokens * (wide * shape.ffn / split + copies * shape.hidden)
    by_matrix = value * 2 * shape.hidden * shape.ffn / split
    return by_tensors + by_matrix + 2 * layer_input(shape, student, row)


def head_workspace(shape: ModelShape, student: StudentConfig, row: MicroBatch, config: Config) -> float:
    """Of the fused log-prob: a block of logits, and the gradients of hidden states (float32) and of its matrix."""
    value, tokens = VALUE_BYTES[student.dtype], row.tokens / student.context_parallel
    height, width = CPU_BLOCK if backend_of(student) == "torch" else GPU_BLOCK
    columns = -(-shape.vocab // student.tensor_parallel)
    block = min(height, tokens) * min(width, columns) * (2 * value + 2 * FLOAT)
    by_columns = FLOAT * min(width, columns) * shape.hidden
    gathered = value * tokens * shape.hidden if student.sequence_parallel else 0
    sums = FLOAT * tokens * (3 + config.scoring.top_k)
    return block + by_columns + gathered + sums + tokens * shape.hidden * FLOAT + value * columns * shape.hidden


def plain_logits_bytes(shape: ModelShape, student: StudentConfig, row: MicroBatch) -> float:
    """What logits would take instead, without the fused log-prob: themselves, a float32 copy, gradients of both."""
    values = row.tokens / student.context_parallel * shape.vocab / student.tensor_parallel
    return values * 2 * (VALUE_BYTES[student.dtype] + FLOAT)


def refresh_bytes(config: Config, shape: ModelShape) -> float:
    """Buckets on rank 0 while weights leave: one being made, one waiting, one as a payload; and one whole matrix."""
    value = VALUE_BYTES[config.student.dtype]
    largest = value * max(shape.head_params, 2 * shape.hidden * shape.ffn)
    bucket = min(max(config.refresh.bucket_mb << 20, largest), value * shape.sent_by(config.student).params)
    return 3 * bucket + largest


def checkpoint_bytes(config: Config, shape: ModelShape) -> float:
    """Files of one checkpoint: weights, the optimizer's float32 copy of them (of float32 weights too), and moments."""
    frozen = 0 if config.student.train_vision else shape.tower_params
    return shape.params * VALUE_BYTES[config.student.dtype] + (shape.params - frozen) * (FLOAT + MOMENTS)


def host_bytes(config: Config, shape: ModelShape, gpus_per_node: int) -> float:
    """Main memory of the fullest node for a checkpoint that is written in the background.

    The first data-parallel rank of each tensor- and pipeline-parallel rank gathers its optimizer state and copies it.
    """
    student = config.student
    block = student.tensor_parallel * student.copies  # ranks of one pipeline stage, which follow one another
    stages = max(1, min(student.pipeline_parallel, gpus_per_node // block))
    writers = min(gpus_per_node, student.tensor_parallel) * stages
    return checkpoint_bytes(config, shape) * writers / (student.tensor_parallel * student.pipeline_parallel)
