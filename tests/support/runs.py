"""Runs of the command line, as flow tests see them."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "conf" / "toy.yaml"
COMMAND = ROOT / ".venv" / "bin" / "megatron-opd"
START_LIMIT_S = 300
GONE_LIMIT_S = 20  # what the project promises


@dataclass(frozen=True)
class Servers:
    """URLs of the shared servers."""

    rollout: str
    math: str
    code: str

    def attach(self) -> list[str]:
        """Overrides that make a run use them."""
        return [
            f"rollout.server.urls=[{self.rollout}]",
            f"teachers.math.server.urls=[{self.math}]",
            f"teachers.code.server.urls=[{self.code}]",
        ]


@dataclass(frozen=True)
class Run:
    """A run of the command line that has ended or goes on."""

    process: subprocess.Popen
    folder: Path
    output: Path

    def text(self) -> str:
        return self.output.read_text()

    def summary(self) -> dict:
        return json.loads((self.folder / "summary.json").read_text())

    def metrics(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def events(self) -> list[dict]:
        path = self.folder / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for(self, event: str, limit_s: float = START_LIMIT_S) -> None:
        """Wait until an event of that kind was recorded."""
        deadline = time.monotonic() + limit_s
        while event not in [e["event"] for e in self.events()]:
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.1)

    def wait_for_step(self, step: int, limit_s: float = START_LIMIT_S) -> None:
        """Wait until the line of that step was written."""
        deadline = time.monotonic() + limit_s
        while step not in self.steps():
            assert self.process.poll() is None and time.monotonic() < deadline, self.text()
            time.sleep(0.05)

    def steps(self) -> list[int]:
        """The steps that have a line."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("\n")]

    def kill_everything(self) -> None:
        """kill -9 for the supervisor and every process below it, as when a machine goes down."""
        family = [psutil.Process(self.process.pid), *self.family().values()]
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait(GONE_LIMIT_S)

    def family(self) -> dict[str, psutil.Process]:
        """Every process of the run, by its command line; the supervisor is not among them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return {f"{command_of(child)} [{child.pid}]": child for child in children}


@contextmanager
def starting(outputs: Path) -> Iterator[Callable[..., Run]]:
    """A function that starts the command line: the run's folder, then arguments. Output goes to files in ``outputs``.

    What still runs afterwards is killed.
    """
    runs: list[Run] = []

    def begin(folder: Path, *arguments: str) -> Run:
        output = outputs / f"{len(runs)}.out"
        argv = [str(COMMAND), *arguments]
        with output.open("wb") as file:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        runs.append(Run(process, folder, output))
        return runs[-1]

    try:
        yield begin
    finally:
        for run in runs:
            if run.process.poll() is None:
                run.process.kill()


def finish(run: Run, limit_s: float = 300) -> int:
    """Wait for the end and return the exit code."""
    try:
        return run.process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(run.text()) from None


def assert_all_gone(processes: list[psutil.Process], limit_s: float = GONE_LIMIT_S) -> float:
    """Wait until none of ``processes`` lives, for at most ``limit_s``; returns how long it took."""
    began = time.monotonic()
    while living := [process for process in processes if lives(process)]:
        assert time.monotonic() - began < limit_s, [command_of(process) for process in living]
        time.sleep(0.1)
    return time.monotonic() - began


def lives(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_of(process: psutil.Process) -> str:
    """Its command line; empty when it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
