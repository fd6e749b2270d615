"""A plan as a person reads it: tables of at most 100 columns."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from megatron_opd.config import StudentConfig
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.estimate import Plan, ServerPlan, gib
from megatron_opd.plan.layouts import Comparison, as_overrides, describe
from megatron_opd.plan.memory import plain_logits_bytes
from megatron_opd.plan.scale import GPU_COUNTS, Scaled
from megatron_opd.plan.shape import ModelShape
from megatron_opd.plan.work import largest_row

WIDTH = 100
SHOWN_LAYOUTS = 10
MEMORY_PARTS = {
    "weights": "weights",
    "gradients": "gradients, float32",
    "optimizer": "optimizer, split over copies",
    "activations": "activations of micro-batches in flight",
    "workspace": "backward pass of one layer or of the head",
    "refresh": "(weight refresh, instead of the two above)",
    "peak": "together, at most",
}


def make_console() -> Console:
    """As wide as the terminal, up to 100 columns."""
    console = Console(highlight=False)
    return Console(highlight=False, width=min(console.width, WIDTH) if console.is_terminal else WIDTH)


def show_plan(plan: Plan, given: Assumptions, console: Console) -> None:
    """Everything about one config."""
    _heading(plan, console)
    console.print(_student_table(plan))
    console.print(_server_table([plan.rollout, *plan.frozen]))
    console.print(_work_table(plan))
    console.print(_time_table(plan))
    _totals(plan, console)
    show_assumptions(plan.setting.assumed, given, console)


def show_layouts(comparison: Comparison, console: Console) -> None:
    """The fastest layouts, and why others do not fit."""
    tried = len(comparison.fitting) + sum(refusal.count for refusal in comparison.refused)
    title = f"Layouts of the student on {comparison.ranks} GPUs: {len(comparison.fitting)} of {tried} fit"
    table = _table(title, "layout", "recompute", "GiB", "train s", "bubble", "messages", "uneven", "rows", left=(0, 1))
    for found in comparison.fitting[:SHOWN_LAYOUTS]:
        time = found.plan.time
        table.add_row(
            describe(found.student),
            found.student.recompute,
            gib(found.plan.peak),
            _number(time.total),
            *(f"{part / time.total:.0%}" for part in (time.bubble, time.messages + time.gradients, time.uneven)),
            str(found.plan.micro_batches),
        )
    console.print(table)
    if comparison.fitting:
        console.print("  rows: micro-batches of one copy in a step; the first layout as arguments:")
        console.print(Padding(" ".join(as_overrides(comparison.fitting[0].student)), (0, 0, 0, 4)))
    if comparison.refused:
        table = _table("Why the others do not fit", "layouts", "reason", "for example", left=(1, 2))
        for refusal in comparison.refused:
            table.add_row(f"{refusal.count}", refusal.what, f"{refusal.layout}:\n{refusal.numbers}")
        console.print(table)


def show_scale(found: dict[str, list[Scaled | None]], console: Console) -> None:
    """The two tables of --scale: the batch of the config, and one that grows."""
    for title, rows in found.items():
        table = _table(title, "GPUs", "rollouts", "student", "engines", "scoring", "step s", "slowest", "tok/s/GPU")
        details = []
        for gpus, row in zip(GPU_COUNTS, rows, strict=True):
            if row is None:
                table.add_row(f"{gpus:,}", *["-"] * 6, "does not fit")
                continue
            scoring, slowest = sum(server.gpus for server in row.frozen), row.time.bottleneck
            table.add_row(
                *(f"{count:,}" for count in (gpus, row.rollouts, gpus - scoring - row.rollout.gpus)),
                *(f"{count:,}" for count in (row.rollout.gpus, scoring)),
                _number(row.time.sequential),
                f"{slowest} {getattr(row.time, slowest) / row.time.sequential:.0%}",
                f"{row.trained / row.time.sequential / gpus:,.0f}",
            )
            details.append(f"  {gpus:>5,} GPUs: student {_layout(row.student.student)}")
        console.print(table)
        for line in details:
            console.print(line, markup=False)
    console.print("\n  tok/s/GPU: tokens trained on, prompts included, a second of a step and each of all GPUs")


def show_assumptions(assumed: Assumptions, given: Assumptions, console: Console) -> None:
    """Every assumption, what it is, and whether it was given."""
    table = _table("Assumptions: change one with --assume key=value", "key", "value", "", "meaning", left=(0, 2, 3))
    for name, field in Assumptions.model_fields.items():
        value = getattr(assumed, name)
        whence = "given" if name in given.model_fields_set else ""
        meaning = re.split("[;:]", field.description or "")[0].removesuffix(".")
        table.add_row(name, "of config" if value is None else f"{value:g}", whence, meaning)
    console.print(table)


def _heading(plan: Plan, console: Console) -> None:
    setting = plan.setting
    student, gpu = setting.config.student, setting.gpu
    console.print(f"\nPlan of {setting.config.name} on {plan.gpus} x {gpu.name}", style="bold", markup=False)
    lines = {
        "GPU": f"{gpu.memory_gib:g} GiB, {gpu.bandwidth_gb_s:,.0f} GB/s, {gpu.bf16_tflops:g} TFLOP/s in bfloat16",
        "": f"({gpu.source})",
        "student": f"{_model(plan.models.student)}, {student.dtype}",
        "layout": f"{student.ranks} GPUs: {_layout(student)}",
        **{role: _model(shape) for role, shape in plan.models.frozen.items()},
    }
    width = max(map(len, lines))
    for name, line in lines.items():
        console.print(f"  {name:{width}}  {line}", markup=False)


def _model(shape: ModelShape) -> str:
    used = shape.body_params + shape.head_params
    experts = f", {used / 1e9:.3g} B for each token" if shape.experts else ""
    return f"{shape.name} ({shape.params / 1e9:.3g} B parameters{experts})"


def _layout(student: StudentConfig) -> str:
    return f"{describe(student)}, recompute {student.recompute}"


def _student_table(plan: Plan) -> Table:
    """Memory by part, of the first, the fullest and the last stage where there are several."""
    student, stages = plan.student, plan.student.stages
    fullest = max(range(len(stages)), key=lambda stage: stages[stage].peak)
    shown = sorted({0, fullest, len(stages) - 1})
    names = ["GiB"] if len(stages) == 1 else [f"stage {stage}" for stage in shown]
    table = _table("Memory of a student's rank, GiB", "part", *names)
    for part, label in MEMORY_PARTS.items():
        table.add_row(
            label,
            *(gib(size) if (size := stages[stage].parts()[part]) else "-" for stage in shown),
            end_section=part == "refresh",
        )
    verdict = "fits" if student.fits else "DOES NOT FIT"
    table.add_row(f"usable of a GPU: {verdict}", *[gib(student.usable)] * len(shown), end_section=True)
    saved = plain_logits_bytes(plan.models.student, plan.setting.config.student, largest_row(plan.setting))
    table.add_row("(logits, which are never made)", *[""] * (len(shown) - 1), gib(saved))
    table.add_row("(main memory of a node, for a checkpoint)", *[""] * (len(shown) - 1), gib(student.host))
    table.add_row("(disk, for one checkpoint)", *[""] * (len(shown) - 1), gib(student.checkpoint))
    return table


def _server_table(servers: Iterable[ServerPlan]) -> Table:
    columns = ("role", "GPUs", "replicas", "weights", "cache", "cache, tokens", "at once", "logits", "fits")
    table = _table("Engines and teachers, GiB on each GPU", *columns)
    for server in servers:
        table.add_row(
            server.role,
            str(server.gpus),
            str(server.replicas),
            gib(server.weights),
            gib(max(server.cache, 0.0)),
            f"{server.cache_tokens:,.0f}",
            f"{server.together:,.0f}",
            gib(server.scoring) if server.scoring else "",
            "NO" if server.problems else "yes",
        )
    return table


def _work_table(plan: Plan) -> Table:
    """Tokens and operations of a step."""
    step, work = plan.setting.step, plan.operations
    title = f"One step: {step.groups:,} prompts x {step.rollouts // step.groups} rollouts"
    table = _table(title, "work", "tokens", "PFLOP", "of all")
    rows = [
        ("generation", step.generated, work.generation),
        ("teachers", step.scored_tokens, work.teachers),
        ("reference", step.scored_tokens, work.reference),
        ("training, forward", step.trained, work.forward),
        ("training, backward", step.trained, work.backward),
        ("training, computed again", None, work.recompute),
    ]
    for name, tokens, flops in rows:
        if flops:
            count = "" if tokens is None else f"{tokens:,.0f}"
            table.add_row(name, count, f"{flops / 1e15:,.3g}", f"{flops / work.total:.1%}")
    table.add_section()
    table.add_row("together", "", f"{work.total / 1e15:,.3g}", "100.0%")
    return table


def _time_table(plan: Plan) -> Table:
    """Seconds of each stage, and how long its GPUs have nothing to do when stages follow one another."""
    table = _table("Time of a step", "stage", "GPUs", "seconds", "of the step", "its GPUs idle", "")
    scoring = sum(server.gpus for server in plan.frozen)
    gpus = {"generate": plan.rollout.gpus, "score": scoring, "train": plan.setting.config.world_size}
    for stage, seconds in asdict(plan.time).items():
        share = seconds / plan.time.sequential
        count = gpus.get(stage)
        table.add_row(
            stage,
            "" if count is None else str(count),
            _number(seconds),
            f"{share:.0%}",
            "" if count is None else f"{1 - share:.0%}",
            "<- bottleneck" if stage == plan.time.bottleneck else "",
        )
    time = plan.student.time
    parts = {"bubble": time.bubble, "messages": time.messages, "gradients": time.gradients, "uneven rows": time.uneven}
    waits = ", ".join(f"{name} {part / time.total:.0%}" for name, part in parts.items() if part > 0.005 * time.total)
    table.caption = f"of training, waiting: {waits}" if waits else None
    return table


def _totals(plan: Plan, console: Console) -> None:
    steps, time = plan.setting.config.steps, plan.time
    rows = [
        ("one after the other", time.sequential, "as strictly on-policy steps are"),
        ("all at once", time.overlapped, "the slowest role alone, if batches were one or two steps old"),
    ]
    table = _table("Step and run", "stages", "step", f"{steps:,} steps", "GPU-hours", "", left=(0, 4))
    for name, step, meaning in rows:
        hours = step * steps / 3600
        table.add_row(name, f"{_number(step)} s", f"{_number(hours)} h", _number(hours * plan.gpus), meaning)
    console.print(table)
    share = time.score / time.sequential
    lines = [f"teachers: {share:.0%} of the step's time, {plan.operations.teacher_share:.0%} of its operations"]
    lines += [f"note: {note}" for note in plan.notes]
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2)))
    for problem in plan.problems:
        console.print(Padding(f"DOES NOT FIT: {problem}", (0, 0, 0, 2), style="red"))


def _table(title: str, *columns: str, left: tuple[int, ...] = (0,)) -> Table:
    """Columns are numbers, to the right, except those of ``left``."""
    table = Table(
        title="\n" + title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption_justify="left"
    )
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in left else "right")
    return table


def _number(value: float) -> str:
    """Three digits, or as many as a whole number has."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
