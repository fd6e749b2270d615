"""Runs that are submitted to a SLURM cluster with the launch script."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from slurm_cluster import SlurmCluster

from runs import ROOT, command_of

SCRIPT = ROOT / "launch" / "train_multi_teacher.sh"
LIMIT_S = 400.0


@dataclass(frozen=True)
class Job:
    """A submitted run."""

    number: str
    folder: Path
    output: Path

    def steps(self) -> list[int]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_steps(self, number: int) -> None:
        self.wait_until(lambda: len(self.steps()) >= number)

    def wait_for_checkpoint(self, step: int) -> None:
        tracker = self.folder / "checkpoints" / "latest_checkpointed_iteration.txt"
        self.wait_until(lambda: tracker.exists() and int(tracker.read_text()) >= step)

    def wait_until(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not seen():
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.2)

    def processes(self) -> list[psutil.Process]:
        """All that have the run's folder in their command line."""
        return [process for process in psutil.process_iter() if str(self.folder) in command_of(process)]

    def server(self, model: str) -> psutil.Process:
        """Of those on the job's nodes that serve a model whose path has ``model``, the one that began first."""
        found = [process for process in psutil.process_iter() if self._serves(process, model)]
        return min(found, key=lambda process: process.create_time())

    def _serves(self, process: psutil.Process, model: str) -> bool:
        command = command_of(process)
        try:
            return model in command and "srun" not in command and process.environ().get("SLURM_JOB_ID") == self.number
        except psutil.Error:  # it has just ended
            return False


def submit(
    cluster: SlurmCluster, folder: Path, name: str, *overrides: str, ask: tuple[str, ...] = ("--nodes=3",)
) -> Job:
    """Start a run that has the job's nodes ``ask`` for."""
    output = folder / f"{name}.out"
    argv = ["sbatch", "--parsable", f"--output={output}", *ask, str(SCRIPT), "conf/toy.yaml"]
    argv += [f"name={name}", f"output={folder}", *overrides]
    done = subprocess.run(argv, cwd=ROOT, env=cluster.environment, check=True, capture_output=True, text=True)
    return Job(done.stdout.strip(), folder / name, output)
