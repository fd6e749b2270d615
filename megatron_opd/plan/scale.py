"""The config's models on 8 to 4,096 GPUs: how to divide them among the roles, and what a step then takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from megatron_opd.plan.estimate import (
    Models,
    ServerPlan,
    StepTime,
    make_setting,
    plan_frozen,
    plan_rollout,
    step_time,
)
from megatron_opd.plan.layouts import Candidate, compare_layouts
from megatron_opd.plan.training import refresh_seconds
from megatron_opd.plan.work import Setting

GPU_COUNTS = (8, 64, 512, 4096)
PARTS = 16  # a division is looked for in sixteenths of all GPUs


@dataclass(frozen=True)
class Scaled:
    """The best division of ``gpus`` GPUs for one batch."""

    gpus: int
    rollouts: int  # of a step
    student: Candidate
    rollout: ServerPlan
    frozen: list[ServerPlan]
    time: StepTime
    trained: float  # tokens of a step


def scale(setting: Setting, models: Models, *, grow: bool) -> list[Scaled | None]:
    """One entry for each of ``GPU_COUNTS``, None where nothing fits.

    grow: prompts of a step grow with the GPUs, from those of the config at 8; else the batch stays.
    """
    found = []
    for gpus in GPU_COUNTS:
        factor = gpus // GPU_COUNTS[0] if grow else 1
        prompts = setting.config.rollout.prompts_per_step * factor
        rollout = setting.config.rollout.model_copy(update={"prompts_per_step": prompts})
        config = setting.config.model_copy(update={"rollout": rollout})
        found.append(best_division(make_setting(config, setting.gpu, setting.assumed), models, gpus))
    return found


def best_division(setting: Setting, models: Models, gpus: int) -> Scaled | None:
    """The division among the roles with the shortest step; None where nothing fits."""

    @cache
    def student_on(ranks: int) -> Candidate | None:
        fitting = compare_layouts(setting, models, ranks).fitting
        return fitting[0] if fitting else None

    sender = setting.config.student
    refresh = refresh_seconds(models.student.sent_by(sender), sender.dtype, setting.assumed)
    best: Scaled | None = None
    for ranks, sampling, scoring in divisions(setting, gpus):
        student = student_on(ranks)
        if student is None:
            continue
        assumed = setting.assumed.model_copy(update={"rollout_gpus": sampling, "teacher_gpus": scoring})
        case = Setting(setting.config, setting.gpu, assumed, setting.step)
        rollout, frozen = plan_rollout(case, models.student), plan_frozen(case, models)
        if any(server.problems for server in [rollout, *frozen]):
            continue
        time = step_time(student.plan, rollout, frozen, refresh)
        found = Scaled(gpus, setting.step.rollouts, student, rollout, frozen, time, setting.step.trained)
        if best is None or time.sequential < best.time.sequential:
            best = found
    return best


def divisions(setting: Setting, gpus: int) -> Iterator[tuple[int, int, int]]:
    """GPUs of the student, of rollout engines, and of each frozen model; all are used."""
    config = setting.config
    servers = [teacher.server for teacher in config.teachers.values()]
    servers += [config.reference.server] if config.reference else []
    engine, scorer = config.rollout.server.tensor_parallel, max(server.tensor_parallel for server in servers)
    unit = max(1, gpus // PARTS)
    for ranks in range(unit, gpus, unit):
        for scoring in range(max(unit // len(servers), scorer), gpus, max(unit // len(servers), 1)):
            sampling = gpus - ranks - scoring * len(servers)
            if sampling < engine:
                break
            if sampling % engine == 0 and all(scoring % server.tensor_parallel == 0 for server in servers):
                yield ranks, sampling, scoring
