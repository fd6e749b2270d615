"""Rollout engines and teachers: what fits into their memory, and how long they sample and score."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.config import EngineConfig
from megatron_opd.plan.activations import FLOAT, VALUE_BYTES
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.hardware import Gpu
from megatron_opd.plan.lengths import Lengths
from megatron_opd.plan.shape import ModelShape

PREFILL_CHUNK = 8192  # SGLang's default: most tokens that are prefilled, and scored, at a time


@dataclass(frozen=True)
class Replica:
    """One served model on ``split`` GPUs."""

    shape: ModelShape
    split: int
    engine: EngineConfig
    gpu: Gpu
    assumed: Assumptions

    @property
    def value(self) -> int:
        """Bytes of a weight, and of an entry of the cache."""
        return VALUE_BYTES[self.engine.dtype]

    @property
    def weights(self) -> float:
        """Bytes of weights on each GPU."""
        return self.shape.params * self.value / self.split

    @property
    def kv_token(self) -> float:
        """Bytes of one cached token on each GPU; heads are repeated where there are more ranks than heads."""
        return self.shape.kv_bytes(self.value) / min(self.split, self.shape.kv_heads)

    @property
    def kv_memory(self) -> float:
        """Bytes of the cache on each GPU, below 0 where the weights alone do not fit."""
        room = self.gpu.memory * self.engine.memory_fraction - self.weights
        limit = self.engine.max_total_tokens
        return room if limit is None else min(room, limit * self.kv_token)

    @property
    def kv_tokens(self) -> float:
        """Tokens that the cache holds."""
        return max(0.0, self.kv_memory / self.kv_token)

    @property
    def scoring_memory(self) -> float:
        """Logits of one chunk of scored positions, and their log-softmax, in float32; outside memory_fraction."""
        return 2 * FLOAT * PREFILL_CHUNK * self.shape.vocab / self.split

    def concurrency(self, sequences: float, context: float) -> float:
        """Sequences that are sampled at once, of ``sequences``, at a mean context of ``context`` tokens."""
        return max(1.0, min(sequences, self.engine.max_concurrency, self.kv_tokens / context))

    def decode_step(self, sequences: np.ndarray, context: np.ndarray) -> np.ndarray:
        """Seconds of one token for each of ``sequences`` [n] sequences with ``context`` [n] tokens before it."""
        read = np.vectorize(self.shape.served_bytes_read)(sequences, self.value) / self.split
        read = read + sequences * context * self.kv_token
        operations = 2 * sequences * (self.shape.body_params + self.shape.head_params) / self.split
        operations = operations + 4 * sequences * context * self.shape.layers * self.shape.query_width / self.split
        peak = np.maximum(read / self.gpu.bandwidth, operations / self.gpu.flops(self.engine.dtype))
        return peak / self.assumed.decode_utilisation + self.assumed.decode_overhead_ms / 1000

    def sampling_seconds(self, sequences: float, prompt: float, lengths: Lengths) -> float:
        """Seconds until ``sequences`` responses are sampled, the longest included.

        While others wait, as many as fit are under way, at all ages; then they end one after the other, and the few
        longest ones set the end.
        """
        width = lengths.longest / len(lengths.points)
        context = prompt + lengths.mean_age
        together = self.concurrency(sequences, context)
        full = self.decode_step(np.array([together]), np.array([context]))[0]
        waiting = (sequences - together) * lengths.mean / together * full
        left = np.maximum(together * lengths.survival(), 1.0)
        return float(waiting + (self.decode_step(left, prompt + lengths.points) * width).sum())

    def prefill_seconds(self, flops: float) -> float:
        """Seconds of ``flops`` operations on prompts and responses that are known."""
        return flops / (self.split * self.gpu.flops(self.engine.dtype) * self.assumed.prefill_utilisation)
