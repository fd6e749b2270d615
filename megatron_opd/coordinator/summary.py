"""The result of a run as one JSON document."""

from __future__ import annotations

from dataclasses import asdict

from megatron_opd.config import Config
from megatron_opd.coordinator.evaluate import Accuracy
from megatron_opd.coordinator.loop import Totals
from megatron_opd.runtime.messages import RefreshReport

Evaluations = dict[str, dict[str, Accuracy]]


def summary(
    config: Config, evaluations: Evaluations, totals: Totals, reports: list[RefreshReport], engine: dict, wall_s: float
) -> dict:
    """Accuracies, sizes and times; ``engine`` is the rollout server's own account of itself."""
    return {
        "name": config.name,
        "seed": config.seed,
        "steps": len(reports) - 1,
        "wall_s": round(wall_s, 1),
        "eval": _evaluations(evaluations),
        "tokens": asdict(totals),
        "engine": {"name": "sglang", "version": engine["version"]},
        "student": reports[0].info.model_dump(),
        "refresh": {
            "mode": config.refresh.mode,
            "seconds_per_step": sum(report.refresh_s for report in reports) / len(reports),
            "bytes_per_step": reports[-1].refresh_bytes,
            "max_probe_difference": max(report.probe_difference for report in reports),
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
