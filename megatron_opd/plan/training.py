"""Seconds of the student's part of a step under one layout: arithmetic, bubbles, and messages."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.config import StudentConfig
from megatron_opd.plan.activations import FLOAT, VALUE_BYTES, MicroBatch
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.hardware import Gpu
from megatron_opd.plan.memory import stage_params
from megatron_opd.plan.shape import ModelShape
from megatron_opd.plan.work import Setting, rows_of, training_flops


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
    and backward. Pipeline: hidden states and their gradients, once for each part. The ring of context parallelism is
    taken to be hidden behind attention, as it is for long rows.
    """
    layers = shape.layers / student.pipeline_parallel
    hidden = row.tokens / student.context_parallel * shape.hidden * VALUE_BYTES[student.dtype]
    again = 1.5 if student.recompute == "full" else 1.0
    split, experts = student.tensor_parallel, student.expert_parallel
    sums = layers * 8 * again * hidden * (split - 1) / split
    seconds = sums / _speed(split, gpu, assumed)
    if shape.experts:
        own = hidden / split if student.sequence_parallel else hidden
        moved = layers * 4 * again * own * shape.experts_per_token * assumed.expert_imbalance * (experts - 1) / experts
        seconds += moved / _speed(experts * student.expert_tensor, gpu, assumed)
    if student.pipeline_parallel > 1:
        passed = 2 * student.virtual_pipeline * hidden / (split if student.sequence_parallel else 1)
        seconds += passed / _speed(student.ranks, gpu, assumed)
    return seconds


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
