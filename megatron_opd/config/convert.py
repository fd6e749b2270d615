"""Options of ``megatron-opd convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_opd.config.base import PositiveFloat, PositiveInt, Section
from megatron_opd.config.sections import StudentConfig


class ConversionConfig(Section):
    """How a model is spread over processes while it is converted."""

    tensor_parallel: PositiveInt = 1
    """Processes that share every matrix."""
    pipeline_parallel: PositiveInt = 1
    """Stages that share the layers."""
    expert_parallel: PositiveInt = 1
    """Processes that share the experts of a mixture-of-experts layer; each holds all other weights."""
    expert_tensor_parallel: PositiveInt | None = None
    """Processes that share the matrices of one expert; null takes tensor_parallel."""
    threads_per_rank: PositiveInt = 1
    """CPU threads of one process."""

    def student(self, model: Path, dtype: Literal["float32", "bfloat16"]) -> StudentConfig:
        """The student that these options describe: on the CPU, since a conversion moves bytes only."""
        return StudentConfig(
            model=model,
            tensor_parallel=self.tensor_parallel,
            pipeline_parallel=self.pipeline_parallel,
            data_parallel=self.expert_parallel,
            expert_parallel=self.expert_parallel,
            expert_tensor_parallel=self.expert_tensor_parallel,
            sequence_parallel=self.tensor_parallel > 1,  # experts demand it; it changes no weight
            threads_per_rank=self.threads_per_rank,
            dtype=dtype,
            device="cpu",
            backend="torch",
        )


class ToMegatronConfig(ConversionConfig):
    """Options of ``convert to-megatron``."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the checkpoint; null keeps that of the weights."""


class ToHfConfig(ConversionConfig):
    """Options of ``convert to-hf``."""

    source: Path | None = None
    """Hugging Face folder with config and tokenizer; null takes that of the run, or what to-megatron kept."""
    shard_gb: PositiveFloat = 4.0
    """Most gigabytes (2**30 bytes) of one weight file."""
