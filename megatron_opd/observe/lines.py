"""The lines of the console: banner, steps, and where things are at the end."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd import __version__
from megatron_opd.config import Config, SinksConfig, StudentConfig
from megatron_opd.runtime import env
from megatron_opd.runtime.rundir import RunDirectory


@dataclass(frozen=True, slots=True)
class Column:
    """One number of a step's line."""

    label: str
    metric: str
    form: str
    width: int  # of the value, so that the lines of all steps are aligned
    rank: int  # on a narrow terminal the columns with the highest rank go first


COLUMNS = (
    Column("loss", "loss/policy", "{:+.4f}", 7, 1),
    Column("gap", "opd/gap", "{:+.3f}", 6, 1),
    Column("correct", "reward/correct", "{:.0%}", 4, 1),
    Column("kept", "balance/kept", "{:.0%}", 4, 4),
    Column("auc", "order/auc", "{:.2f}", 4, 3),
    Column("shift", "calibration/mean_shift", "{:.2f}", 4, 4),
    Column("length", "rollout/length", "{:.0f}", 5, 5),
    Column("grad", "loss/grad_norm", "{:.2f}", 5, 6),
    Column("collect", "time/collect_s", "{:.1f}s", 6, 7),
    Column("train", "time/train_s", "{:.1f}s", 6, 7),
    Column("tok/s", "perf/tokens_per_s", "{:.0f}", 6, 2),
)


def banner_lines(config: Config, run: RunDirectory) -> list[str]:
    """The facts that matter: who learns from whom, how much, by which recipe, and where it can be watched."""
    student, rollout = config.student, config.rollout
    batch = rollout.prompts_per_step * rollout.samples_per_prompt
    names = [f"{domain} = {teacher.model}" for domain, teacher in config.teachers.items()]
    lines = [
        f"megatron_opd {__version__}   run {config.name}",
        f"  student   {student.model}",
        f"            {student.dtype}, {layout(student)}",
        *(f"  {'teachers' if number == 0 else '':9} {name}" for number, name in enumerate(names)),
        f"  data      {config.data.train}",
        f"  steps     {config.steps} of {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} rollouts "
        f"= {batch}, up to {rollout.max_new_tokens:,} tokens each",
        f"  recipe    {_recipe(config)}",
        f"  folder    {run.path.absolute()}",
        f"  logs      tail -F {run.logs.absolute()}/*.log",
    ]
    return lines + [f"  sink      {line}" for line in _sinks(config.sinks, run)]


def step_line(
    step: int, metrics: dict[str, float], config: Config, left_s: float | None, width: int | None = None
) -> str:
    """One aligned line; what is not in ``metrics`` is "n/a", what the recipe does not do is left out.

    left_s: estimated rest of the run; width: most characters, None for all columns.
    """
    switched_off = {"balance": config.balance is None, "calibration": config.calibration is None}
    columns = [column for column in COLUMNS if not switched_off.get(column.metric.partition("/")[0])]
    head = f"step {step:>{len(str(config.steps))}}/{config.steps}"
    tail = [] if left_s is None else [f"eta {duration(left_s):>7}"]
    while True:
        line = " | ".join([head, *(_value(column, metrics) for column in columns), *tail])
        if width is None or len(line) <= width or not columns:
            return line
        columns.remove(max(columns, key=lambda column: column.rank))


def result_lines(summary: dict, run: RunDirectory) -> list[str]:
    """Sizes, where everything is, and what to do next."""
    tokens, folder = summary["tokens"], run.path.absolute()
    places = [
        ("summary", run.summary, ""),
        ("student", run.export, "Hugging Face checkpoint"),
        ("metrics", run.metrics, "meanings: docs/operations.md"),
        ("rollouts", run.trajectories, ""),
    ]
    return [
        f"{summary['steps']} steps in {duration(summary['wall_s'])}; tokens: {tokens['generated']:,} generated, "
        f"{tokens['scored']:,} scored, {tokens['trained']:,} trained",
        *(f"{name:9} {path.absolute()}" + (f"  ({what})" if what else "") for name, path, what in places),
        f"next      megatron-opd view {folder}    # how it went, one page",
        f"          megatron-opd audit {folder}   # what the recipe did",
    ]


def duration(seconds: float) -> str:
    """12 s, 3m05s, 2h10m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if hours == 0:
        return f"{minutes}m{whole % 60:02}s"
    return f"{hours}h{minutes % 60:02}m" if days == 0 else f"{days}d{hours % 24:02}h"


def percent(value: float | None) -> str:
    """A share; None: there was nothing to grade."""
    return "not graded" if value is None else f"{100 * value:.1f} %"


def layout(student: StudentConfig) -> str:
    """The parallel sizes in a row: "TP 2 x PP 2 x DP 1"; those that are rarely used only where they are."""
    sizes = {"TP": student.tensor_parallel, "PP": student.pipeline_parallel, "CP": student.context_parallel}
    used = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "TP"]
    experts = f", EP {student.expert_parallel}" if student.expert_parallel > 1 else ""
    return " x ".join([*used, f"DP {student.data_parallel}"]) + experts


def _value(column: Column, metrics: dict[str, float]) -> str:
    value = metrics.get(column.metric)
    return f"{column.label} {'n/a' if value is None else column.form.format(value):>{column.width}}"


def _recipe(config: Config) -> str:
    parts = []
    if config.balance is not None:
        parts.append(f"balancing ({config.balance.scope})")
    if config.calibration is not None:
        parts.append(f"margin calibration (delta {config.calibration.delta:g})")
    return " + ".join(["distillation", *parts])


def _sinks(sinks: SinksConfig, run: RunDirectory) -> list[str]:
    lines = []
    if sinks.tensorboard:
        lines.append(f"tensorboard --logdir {run.tensorboard.absolute()}")
    if sinks.wandb:
        mode = env.wandb_mode()
        lines.append(f"wandb project {sinks.wandb_project}, run {run.identity()}, {mode}")
        if mode == "offline":
            lines.append(f"later: wandb sync {run.path.absolute()}/wandb/offline-run-*")
    return lines
