"""The line of metrics.jsonl for one step, from what each part of the run knows of it."""

from __future__ import annotations

from collections import Counter

from megatron_opd.coordinator.stages import StepRollouts
from megatron_opd.recipe.diagnostics import step_diagnostics
from megatron_opd.recipe.objective import StepObjective
from megatron_opd.runtime.messages import RefreshReport


def step_metrics(
    step: int, rollouts: StepRollouts, objective: StepObjective, report: RefreshReport
) -> dict[str, float]:
    """Everything but the times of the whole step. Names: ``observe.metrics``, docs/operations.md."""
    metrics = staleness(step, rollouts) | step_diagnostics(
        objective.rollouts, rollouts.unscored, [item for item, _ in rollouts.dropped]
    )
    calibration = objective.calibration
    if calibration is not None:
        metrics |= _known("calibration/margin_before", calibration.margin_before)
        metrics |= _known("calibration/margin_after", calibration.margin_after)
        metrics |= _known("calibration/changed_groups", calibration.changed_groups)
    return (
        metrics
        | _teacher_metrics(rollouts)
        | report.training
        | {
            "balance/trained_rollouts": len(objective.samples),
            "balance/refilled_prompts": rollouts.refills,
            "rollout/tokens": sum(len(item.rollout.token_ids) for item in rollouts.verified),
            "teacher/tokens": sum(len(item.teacher_logprobs) for item in rollouts.scored),
            "loss/tokens": sum(int((sample.weights > 0).sum()) for sample in objective.samples),
            "refresh/seconds": report.refresh_s,
            "refresh/probe_difference": report.probe_difference,
        }
        | {f"time/{stage}_s": seconds for stage, seconds in rollouts.mean_stage_seconds.items()}
    )


def _teacher_metrics(rollouts: StepRollouts) -> dict[str, float]:
    """Drops, by kind too, and how many tokens teachers computed for each one that they scored."""
    kinds = Counter(drop.kind for _, drop in rollouts.dropped)
    scored = sum(len(item.teacher_logprobs) for item in rollouts.scored)
    prefilled = sum(item.prefilled for item in rollouts.scored)
    return (
        {"teacher/dropped": len(rollouts.dropped)}
        | {f"teacher/dropped/{kind}": count for kind, count in sorted(kinds.items())}
        | _known("teacher/prefilled_per_scored", prefilled / scored if scored else None)
    )


def staleness(step: int, rollouts: StepRollouts) -> dict[str, float]:
    """By how many steps the weights that drew the step's tokens are older than those that it trains.

    rollout/staleness      mean over scored tokens
    rollout/staleness_max  of the oldest one
    rollout/stale_dropped  rollouts beyond rollout.max_staleness: dropped, and drawn again
    """
    dropped = {"rollout/stale_dropped": float(len(rollouts.stale))}
    versions = [item.verified.rollout.versions for item in rollouts.scored]
    if not versions:
        return dropped
    mean = sum(int(tokens.sum()) for tokens in versions) / sum(map(len, versions))
    oldest = min(int(tokens.min()) for tokens in versions)
    return dropped | {"rollout/staleness": step - mean, "rollout/staleness_max": float(step - oldest)}


def _known(name: str, value: float | None) -> dict[str, float]:
    return {} if value is None else {name: value}
