"""``megatron-opd plan``: from a config to tables or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import typer

from megatron_opd.config import Config
from megatron_opd.errors import ConfigError
from megatron_opd.plan.assumptions import Assumptions, parse_assumptions
from megatron_opd.plan.estimate import Models, Plan, StepTime, StudentPlan, make_plan, make_setting, read_models
from megatron_opd.plan.hardware import find_gpu
from megatron_opd.plan.layouts import Comparison, as_overrides, compare_layouts
from megatron_opd.plan.report import make_console, show_assumptions, show_layouts, show_plan, show_scale
from megatron_opd.plan.scale import GPU_COUNTS, Scaled, scale
from megatron_opd.plan.work import Setting


def plan(config: Config, gpu: str, items: list[str], *, layouts: bool, scaled: bool, as_json: bool) -> bool:
    """Print the plan, the comparison of layouts, or the plan at scale; whether it fits.

    items: ``key=value`` assumptions. Raises OpdError for what cannot be planned.
    """
    if layouts and scaled:
        raise ConfigError("Two different questions at once", got="--layouts and --scale", fix="ask one after the other")
    given = parse_assumptions(items)
    models = read_models(config)
    setting = make_setting(config, find_gpu(gpu), given)
    if layouts:
        return _layouts(setting, models, given, as_json)
    if scaled:
        return _scale(setting, models, given, as_json)
    made = make_plan(setting, models)
    if as_json:
        typer.echo(json.dumps(plan_json(made)))
    else:
        show_plan(made, given, make_console())
    return not made.problems


def plan_json(made: Plan) -> dict[str, Any]:
    """The plan in numbers: bytes, seconds, tokens, operations."""
    step = made.setting.step
    return {
        "name": made.setting.config.name,
        "fits": not made.problems,
        "problems": made.problems,
        "notes": made.notes,
        "gpu": asdict(made.setting.gpu),
        "gpus": made.gpus,
        "assumptions": made.setting.assumed.model_dump(),
        "parameters": {"student": made.models.student.params}
        | {role: shape.params for role, shape in made.models.frozen.items()},
        "student": {"layout": as_overrides(made.setting.config.student), **student_json(made.student)},
        "servers": [asdict(server) for server in [made.rollout, *made.frozen]],
        "tokens": {"generated": step.generated, "scored": step.scored_tokens, "trained": step.trained},
        "operations": asdict(made.operations) | {"teacher_share": made.operations.teacher_share},
        "seconds": time_json(made.time),
        "gpu_hours": made.time.sequential * made.setting.config.steps * made.gpus / 3600,
        "bottleneck": made.time.bottleneck,
    }


def student_json(student: StudentPlan) -> dict[str, Any]:
    """The student's memory and time."""
    return {
        "stages": [stage.parts() for stage in student.stages],
        "peak": student.peak,
        "usable": student.usable,
        "host": student.host,
        "checkpoint": student.checkpoint,
        "micro_batches": student.micro_batches,
        "seconds": asdict(student.time) | {"total": student.time.total},
    }


def time_json(time: StepTime) -> dict[str, float]:
    """Seconds of a step."""
    return asdict(time) | {"sequential": time.sequential, "overlapped": time.overlapped}


def _layouts(setting: Setting, models: Models, given: Assumptions, as_json: bool) -> bool:
    comparison = compare_layouts(setting, models, setting.assumed.student_gpus or setting.config.world_size)
    if as_json:
        typer.echo(json.dumps(_comparison_json(comparison)))
    else:
        console = make_console()
        show_layouts(comparison, console)
        show_assumptions(setting.assumed, given, console)
    return bool(comparison.fitting)


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    fitting = [{"layout": as_overrides(found.student), **student_json(found.plan)} for found in comparison.fitting]
    return {"ranks": comparison.ranks, "fitting": fitting, "refused": [asdict(one) for one in comparison.refused]}


def _scale(setting: Setting, models: Models, given: Assumptions, as_json: bool) -> bool:
    found = {
        "Scale, the batch of the config": scale(setting, models, grow=False),
        "Scale, prompts grow with the GPUs": scale(setting, models, grow=True),
    }
    if as_json:
        rows = {title: [_scaled_json(row) for row in rows] for title, rows in found.items()}
        typer.echo(json.dumps({"gpus": GPU_COUNTS, **rows}))
    else:
        console = make_console()
        show_scale(found, console)
        show_assumptions(setting.assumed, given, console)
    return any(row is not None for rows in found.values() for row in rows)


def _scaled_json(row: Scaled | None) -> dict[str, Any] | None:
    if row is None:
        return None
    return {
        "gpus": row.gpus,
        "rollouts": row.rollouts,
        "student": {"layout": as_overrides(row.student.student), **student_json(row.student.plan)},
        "servers": [asdict(server) for server in [row.rollout, *row.frozen]],
        "seconds": time_json(row.time),
        "bottleneck": row.time.bottleneck,
    }
