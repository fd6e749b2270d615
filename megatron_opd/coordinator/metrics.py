"""The line of metrics.jsonl for one step, from what each part of the run knows of it."""

from __future__ import annotations

from megatron_opd.coordinator.stages import StepRollouts
from megatron_opd.recipe.diagnostics import step_diagnostics
from megatron_opd.recipe.objective import StepObjective
from megatron_opd.runtime.messages import RefreshReport


def step_metrics(rollouts: StepRollouts, objective: StepObjective, report: RefreshReport) -> dict[str, float]:
    """Everything but the times of the whole step. Names: ``observe.metrics``, docs/operations.md."""
    metrics = step_diagnostics(objective.rollouts, rollouts.unscored, [item for item, _ in rollouts.dropped])
    calibration = objective.calibration
    if calibration is not None:
        metrics |= _known("calibration/margin_before", calibration.margin_before)
        metrics |= _known("calibration/margin_after", calibration.margin_after)
        metrics |= _known("calibration/changed_groups", calibration.changed_groups)
    return (
        metrics
        | report.training
        | {
            "balance/trained_rollouts": len(objective.samples),
            "balance/refilled_prompts": rollouts.refills,
            "rollout/tokens": sum(len(item.rollout.token_ids) for item in rollouts.verified),
            "teacher/tokens": sum(len(item.teacher_logprobs) for item in rollouts.scored),
            "loss/tokens": sum(int((sample.weights > 0).sum()) for sample in objective.samples),
            "teacher/dropped": len(rollouts.dropped),
            "refresh/seconds": report.refresh_s,
            "refresh/probe_difference": report.probe_difference,
        }
        | {f"time/{stage}_s": seconds for stage, seconds in rollouts.mean_stage_seconds.items()}
    )


def _known(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}
