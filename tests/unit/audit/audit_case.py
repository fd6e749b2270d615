"""What the tests of the audit look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trajectories import Step

from megatron_opd.audit.diagnose import Diagnosis
from megatron_opd.audit.read import Rollouts
from megatron_opd.config import Config


@dataclass(frozen=True)
class Drawn:
    """A run's folder, the records that it was written from, and what the audit makes of it."""

    config: Config
    steps: list[Step]
    files: list[Path]
    rollouts: Rollouts
    diagnosis: Diagnosis
