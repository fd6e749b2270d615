"""What the coordinator must remember to go on after a crash: JSON and safetensors, nothing that can run code.

state.json          counters, evaluations so far, and which prompts the cursor counts
stream.safetensors  cursor and pass rates of the prompt stream
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from megatron_opd.coordinator.evaluate import Accuracy
from megatron_opd.errors import CheckpointError, DataError
from megatron_opd.runtime.messages import RefreshReport

STATE, STREAM = "state.json", "stream.safetensors"


@dataclass
class Totals:
    """Tokens since the start."""

    generated: int = 0  # for training and evaluation
    sampled: int = 0  # for training alone
    scored: int = 0
    trained: int = 0


@dataclass
class Refreshes:
    """Weight refreshes since the start."""

    count: int = 0
    seconds: float = 0.0
    max_probe_difference: float = 0.0

    def add(self, report: RefreshReport) -> None:
        """Count one more."""
        self.count += 1
        self.seconds += report.refresh_s
        self.max_probe_difference = max(self.max_probe_difference, report.probe_difference)


@dataclass
class Progress:
    """How far a run has come. The loop owns the one there is, and changes it as it goes."""

    step: int = 0  # optimizer steps done
    groups: int = 0  # groups of rollouts so far: the number of the next one
    totals: Totals = field(default_factory=Totals)
    refreshes: Refreshes = field(default_factory=Refreshes)
    evaluations: dict[str, dict[str, Accuracy]] = field(default_factory=dict)  # moment to domain to result
    wall_s: float = 0.0  # time that the run has taken
    in_flight: list[str] = field(default_factory=list)  # names of prompts that are drawn and not trained yet, in order


def write(folder: Path, progress: Progress, stream: dict[str, np.ndarray], counted: str) -> None:
    """Make ``folder``, which appears in one rename when it is complete.

    stream: the state of the prompt stream; counted: fingerprint of its prompts.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    for old in (temporary, folder):
        shutil.rmtree(old, ignore_errors=True)
    temporary.mkdir(parents=True)
    plain = asdict(progress) | {"prompts": counted}
    for name, body in ((STATE, (json.dumps(plain, indent=1) + "\n").encode()), (STREAM, save(stream))):
        with (temporary / name).open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
    temporary.rename(folder)


def read(folder: Path, counted: str) -> tuple[Progress, dict[str, np.ndarray]]:
    """What ``write`` wrote: the progress and the state of the prompt stream. ``counted``: fingerprint of its prompts.

    Raises CheckpointError when it cannot be read, DataError when it is of other prompts.
    """
    try:
        plain = json.loads((folder / STATE).read_bytes())
        stream = load((folder / STREAM).read_bytes())
        expected = plain.pop("prompts")
        moments = plain.pop("evaluations").items()
        evaluations = {when: {domain: Accuracy(**one) for domain, one in found.items()} for when, found in moments}
        totals, refreshes = Totals(**plain.pop("totals")), Refreshes(**plain.pop("refreshes"))
        progress = Progress(**plain, totals=totals, refreshes=refreshes, evaluations=evaluations)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError("The coordinator's state cannot be read", where=folder, got=error) from error
    if counted != expected:
        raise DataError(
            "The training prompts are not those that the checkpoint was made with",
            where="data.train",
            got=f"fingerprint {counted}",
            expected=f"fingerprint {expected}",
            fix="put the old file back, or start anew with existing=archive",
        )
    return progress, stream
