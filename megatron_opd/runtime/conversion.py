"""What the processes of a conversion are told, and what they tell."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from megatron_opd.config import StudentConfig
from megatron_opd.config.base import PositiveInt, Section

SIDE_FILES = "hf"  # folder within a converted checkpoint: config and tokenizer of its model


class ConversionJob(Section):
    """One conversion."""

    to: Literal["megatron", "hf"]
    """What is made."""
    student: StudentConfig
    """How the model is spread over the processes; its folder has config, tokenizer and, to Megatron, the weights."""
    checkpoint: Path | None = None
    """The Megatron checkpoint to read; null when one is made."""
    saved_tensor_parallel: PositiveInt = 1
    """Ranks that shared a matrix when that checkpoint was saved."""
    target: Path
    """An empty folder to fill."""
    shard_bytes: PositiveInt = 1
    """Most bytes of one weight file of a Hugging Face folder."""
    events: Path
    """File for what the processes tell, a JSON object a line."""
