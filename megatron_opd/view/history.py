"""What a run has written so far, read while it goes on, after it, or after it failed."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_opd.audit.report import run_config
from megatron_opd.config import Config
from megatron_opd.observe.activity import Doing, read_activity
from megatron_opd.observe.recorder import read_events
from megatron_opd.runtime.rundir import RunDirectory

LOG_LINES, LOG_BYTES = 25, 20_000  # of a failed role's log
State = Literal["running", "finished", "failed", "stopped", "vanished"]


@dataclass(frozen=True, slots=True)
class Failure:
    """Why the run ended before its time, as one of its processes told it."""

    role: str
    error: str
    log: str  # its last lines; empty where it has none


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of correct responses to held-out prompts."""

    value: float | None  # None: nothing could be graded
    error: float | None  # standard error; None also where the run did not record it


@dataclass(frozen=True, slots=True)
class History:
    """Everything of a run but its rollouts."""

    run: RunDirectory
    config: Config
    state: State
    doing: Doing | None  # of a running one
    metrics: list[dict[str, float]]  # a row for each step, in order
    events: list[dict]
    failures: list[Failure]  # since the last start
    accuracies: dict[str, dict[str, Accuracy]]  # "before", "after", "teacher" to domain to result
    seconds: float | None  # from the first to the newest event; None before there is one

    @property
    def steps(self) -> int:
        """Steps that are done."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def of_kind(self, *kinds: str) -> list[dict]:
        """Events of these kinds, oldest first."""
        return [event for event in self.events if event["event"] in kinds]


def read_history(folder: Path) -> History:
    """Raises DataError when there is no run in ``folder``."""
    run = RunDirectory(folder)
    config = run_config(run)
    events = read_events(run.events) if run.events.is_file() else []
    state = _state(run, events)
    times = [event["time"] for event in events]
    return History(
        run=run,
        config=config,
        state=state,
        doing=read_activity(run.activity) if state == "running" else None,
        metrics=_metrics(run.metrics),
        events=events,
        failures=_failures(run, _since_start(events)) if state == "failed" else [],
        accuracies=_accuracies(events),
        seconds=(time.time() if state == "running" else times[-1]) - times[0] if times else None,
    )


def _metrics(path: Path) -> list[dict[str, float]]:
    """Complete lines; the last one may be in the making."""
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _since_start(events: list[dict]) -> list[dict]:
    """Events since the run was last resumed."""
    starts = [number for number, event in enumerate(events) if event["event"] == "resumed"]
    return events[starts[-1] :] if starts else events


def _state(run: RunDirectory, events: list[dict]) -> State:
    if run.is_occupied():
        return "running"
    kinds = {event["event"] for event in _since_start(events)}
    told: tuple[State, ...] = ("failed", "stopped", "finished")
    return next((kind for kind in told if kind in kinds), "vanished")


def _failures(run: RunDirectory, events: list[dict]) -> list[Failure]:
    """Each role's own account once; the supervisor's, which repeats it, only where nobody else said anything."""
    said = {event["role"]: event["error"] for event in events if event["event"] == "failed"}
    roles = [role for role in said if role != "supervisor"] or list(said)
    return [Failure(role, said[role], _last_lines(run.logs / f"{role}.log")) for role in roles]


def _last_lines(path: Path) -> str:
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_BYTES))
        return "\n".join(file.read().decode(errors="replace").splitlines()[-LOG_LINES:])


def _accuracies(events: list[dict]) -> dict[str, dict[str, Accuracy]]:
    found: dict[str, dict[str, Accuracy]] = {}
    for event in events:
        if event["event"] == "evaluated":
            errors = event.get("standard_error", {})
            results = {domain: Accuracy(value, errors.get(domain)) for domain, value in event["accuracy"].items()}
            found.setdefault(event["when"].split()[0], {}).update(results)
    return found
