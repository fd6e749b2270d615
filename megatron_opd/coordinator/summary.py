"""The result of a run as one JSON document."""

from __future__ import annotations

from dataclasses import asdict

from megatron_opd.config import Config
from megatron_opd.coordinator.evaluate import Accuracy
from megatron_opd.coordinator.state import Progress
from megatron_opd.runtime.messages import RefreshReport

Evaluations = dict[str, dict[str, Accuracy]]


def summary(config: Config, progress: Progress, reports: list[RefreshReport], engine: dict) -> dict:
    """Accuracies, sizes and times of the whole run, however often it was started.

    reports: those since the last start; engine: the rollout server's own account of itself.
    """
    refreshes = progress.refreshes
    return {
        "name": config.name,
        "seed": config.seed,
        "steps": progress.step,
        "wall_s": round(progress.wall_s, 1),
        "eval": _evaluations(progress.evaluations),
        "tokens": asdict(progress.totals),
        "engine": {"name": "sglang", "version": engine["version"]},
        "student": reports[0].info.model_dump(),
        "refresh": {
            "mode": config.refresh.mode,
            "seconds_per_step": refreshes.seconds / refreshes.count,
            "bytes_per_step": reports[-1].refresh_bytes,
            "max_probe_difference": refreshes.max_probe_difference,
        },
    }


def _evaluations(evaluations: Evaluations) -> dict:
    """``{before: {domain: accuracy}, ..., n: {before: {domain: responses}}, standard_error: ..., unknown: ...}``."""

    def each(pick: str) -> dict[str, dict]:
        return {
            when: {domain: getattr(accuracy, pick) for domain, accuracy in domains.items()}
            for when, domains in evaluations.items()
        }

    return each("value") | {name: each(pick) for name, pick in _BESIDE.items()}


_BESIDE = {"n": "graded", "standard_error": "standard_error", "unknown": "unknown"}
