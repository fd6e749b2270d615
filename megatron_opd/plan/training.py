"""Seconds of the student's part of a step under one layout: arithmetic, bubbles, and messages."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import StudentConfig
from megatron_opd.plan.activations import FLOAT, VALUE_BYTES, MicroBatch
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.hardware import Gpu
from megatron_opd.plan.memory import stage_params
from megatron_opd.plan.shape import ModelShape
from megatron_opd.plan.work import Setting, rows_of, tower_flops, training_flops


@dataclass(frozen=True, slots=True)
class TrainingTime:
    """Where the seconds of training go, on the busiest rank."""

    arithmetic: float
    uneven: float  # waiting for the copies that have one row more
    bubble: float  # waiting for other pipeline stages
    messages: float  # between ranks of one copy, not hidden
    gradients: float  # summed over copies, and weights gathered, not hidden

    @property
    def total(self) -> float:
        """Seconds of one step."""
        return self.arithmetic + self.uneven + self.bubble + self.messages + self.gradients


def training_time(setting: Setting, shape: ModelShape) -> TrainingTime:
    """Seconds of training under the layout of ``setting``."""
    student, gpu, assumed = setting.config.student, setting.gpu, setting.assumed
    rows, row = rows_of(setting)
    mine = -(-rows // student.data_parallel)  # of the busiest copy
    speed = gpu.flops(student.dtype) * assumed.train_utilisation
    arithmetic = sum(training_flops(setting.config, setting.step, shape)) / (student.ranks * speed)
    # Each rank of the first pipeline stage does all images of its copy, and the other stages wait.
    arithmetic += sum(tower_flops(setting.config, setting.step, shape)) / (student.data_parallel * speed)
    uneven = arithmetic * (mine * student.data_parallel / rows - 1)
    messages = mine * row_messages(shape, student, row, gpu, assumed)
    filled = -(-mine // student.pipeline_parallel) * student.pipeline_parallel if student.virtual_pipeline > 1 else mine
    waiting = (student.pipeline_parallel - 1) / (student.virtual_pipeline * filled)
    bubble = waiting * (arithmetic + uneven + messages)
    gradients = _gradient_seconds(shape, student, gpu, assumed)
    if student.overlap_gradients:
        gradients = max(0.0, gradients - (arithmetic + uneven) / 2)
    return TrainingTime(arithmetic, uneven, bubble, messages, gradients)


def row_messages(shape: ModelShape, student: StudentConfig, row: MicroBatch, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds that one rank waits for others of its copy in one micro-batch, forward and backward.

    Tensor parallelism: four sums a layer, and two more with full recomputation; a sum moves twice its size, as do the
    gathering and the scattered sum in its place with sequence parallelism. Experts: their tokens go and come, forward
    and backward. Pipeline: hidden states and their gradients, once for each part.
    """
    layers = shape.layers / student.pipeline_parallel
    hidden = row.tokens / student.context_parallel * shape.hidden * VALUE_BYTES[student.dtype]
    again = 1.5 if student.recompute == "full" else 1.0
    split, experts = student.tensor_parallel, student.expert_parallel
    own = hidden / split if student.sequence_parallel else hidden
    seconds = _ring(shape, student, row, gpu, assumed)
    if split > 1:
        moved = 8 * hidden * (split - 1) / split / _speed(split, gpu, assumed)
        seconds += layers * again * (moved + 8 * _latency(assumed))
    if experts > 1:
        chosen = own * shape.experts_per_token * assumed.expert_imbalance
        moved = 4 * chosen * (experts - 1) / experts / _speed(experts * student.expert_tensor, gpu, assumed)
        seconds += layers * again * (moved + 4 * _latency(assumed))
    if student.pipeline_parallel > 1:
        passed = own / _speed(student.ranks, gpu, assumed)
        seconds += 2 * student.virtual_pipeline * (passed + _latency(assumed))
    return seconds


def _ring(shape: ModelShape, student: StudentConfig, row: MicroBatch, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds in which context-parallel ranks wait for keys and values: what attention's arithmetic does not hide.

    They go round once forward, and twice backward, with their gradients.
    """
    ranks = student.context_parallel
    if ranks == 1:
        return 0.0
    split = student.tensor_parallel
    layers = shape.layers / student.pipeline_parallel
    keys = row.tokens / ranks * 2 * shape.kv_heads * shape.head_size / split * VALUE_BYTES[student.dtype]
    moved = 3 * layers * (ranks - 1) * (keys / _speed(split * ranks, gpu, assumed) + _latency(assumed))
    flops = 3 * shape.attention_flops(row.squares) / (split * ranks * student.pipeline_parallel)
    return max(0.0, moved - flops / (gpu.flops(student.dtype) * assumed.train_utilisation))


def refresh_seconds(shape: ModelShape, dtype: str, assumed: Assumptions) -> float:
    """Seconds to send all weights from rank 0, over one network card."""
    return shape.params * VALUE_BYTES[dtype] / (assumed.network_gb_s * 1e9 * assumed.transfer_utilisation)


def _gradient_seconds(shape: ModelShape, student: StudentConfig, gpu: Gpu, assumed: Assumptions) -> float:
    """Seconds to sum gradients (float32) over copies and to gather the new weights."""
    params = max(stage_params(shape, student, stage).total for stage in range(student.pipeline_parallel))
    share = (student.copies - 1) / student.copies
    moved = params * share * (FLOAT + VALUE_BYTES[student.dtype])
    return moved / _speed(student.ranks // student.pipeline_parallel, gpu, assumed)


def _speed(span: int, gpu: Gpu, assumed: Assumptions) -> float:
    """Bytes a second among ``span`` neighbouring ranks: a node's link, or the network where they are of several."""
    peak = gpu.link_gb_s if span <= assumed.gpus_per_node else min(assumed.network_gb_s, gpu.link_gb_s)
    return peak * 1e9 * assumed.transfer_utilisation


def _latency(assumed: Assumptions) -> float:
    """Seconds of one message beside its bytes."""
    return assumed.message_latency_us * 1e-6
