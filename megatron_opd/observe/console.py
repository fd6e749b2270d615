"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from megatron_opd import __version__
from megatron_opd.config import Config, StudentConfig
from megatron_opd.errors import OpdError
from megatron_opd.observe.recorder import follow
from megatron_opd.runtime.rundir import RunDirectory

STEP_FIELDS = (  # label, metric, format
    ("loss", "loss/policy", "{:+.4f}"),
    ("gap", "opd/gap", "{:+.3f}"),
    ("correct", "reward/correct", "{:.0%}"),
    ("kept", "balance/kept", "{:.0%}"),
    ("auc", "order/auc", "{:.2f}"),
    ("shift", "calibration/mean_shift", "{:.2f}"),
    ("length", "rollout/length", "{:.0f}"),
    ("grad", "loss/grad_norm", "{:.2f}"),
    ("collect", "time/collect_s", "{:.1f}s"),
    ("train", "time/train_s", "{:.1f}s"),
    ("wait", "time/wait_s", "{:.1f}s"),
    ("ready", "buffer/ready_steps", "{:.0f}"),
    ("tok/s", "perf/tokens_per_s", "{:.0f}"),
)


class ProgressConsole:
    """Lines and a bar. Use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def checking(self) -> None:
        self._say("checking models, tokenizers and data")

    def ready(self, name: str, seconds: float) -> None:
        self._say(f"{name} is ready after {seconds:.0f} s")

    def stopping(self) -> None:
        self._say("stopping all processes of the run")

    def error(self, error: BaseException) -> None:
        self._console.print(f"error: {error}", style="red", markup=False)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _describe(self, doing: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=doing)


class RunConsole(ProgressConsole):
    """Prints one run."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._steps = 0

    def banner(self, config: Config, run: RunDirectory) -> None:
        """The facts that matter, before anything starts."""
        student, rollout = config.student, config.rollout
        teachers = ", ".join(f"{domain} = {teacher.model}" for domain, teacher in config.teachers.items())
        self._steps = config.steps
        self._say(f"megatron_opd {__version__}   run {config.name}")
        self._say(f"  student   {student.model}, {student.dtype}, {_layout(student)}")
        self._say(f"  teachers  {teachers}")
        self._say(
            f"  steps     {config.steps} of {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} rollouts"
        )
        self._say(f"  folder    {run.path.absolute()}")
        self._say(f"  logs      tail -F {run.logs.absolute()}/*.log")
        self._task = self._progress.add_task("starting", total=config.steps)

    def resumed(self, step: int, damaged: list[OpdError], aside: Path | None, *, finished: bool) -> None:
        """From where a run goes on, and what became of the rest."""
        for error in damaged:
            self._console.print(f"warning: a checkpoint is damaged: {error}", style="yellow", markup=False)
        if finished:
            self._say(f"the run had finished after {step} steps; set steps=... higher to go on")
            return
        self._say(f"going on after step {step}" if step else "there is no checkpoint yet: starting from step 0")
        if aside is not None:
            self._say(f"what was done after it was moved to {aside.absolute()}")

    def show(self, events: TextIO) -> None:
        """Print what was recorded since the last call."""
        for event in follow(events):
            match event["event"]:
                case "live":
                    self._say(_live(event))
                case "evaluating":
                    self._say(f"evaluating {event['when']} training on {event['prompts']} held-out prompts")
                    self._describe(f"evaluating {event['when']}")
                case "evaluated":
                    self._say(f"accuracy {event['when']}: {_shares(event['accuracy'])}")
                    self._describe("training")
                case "dropped":
                    self._say(f"step {event['step']}: dropped rollouts: {'; '.join(event['reasons'])}")
                case "checkpoint":
                    self._say(_checkpoint_line(event))
                case "checkpoint_failed":
                    self._console.print(f"warning: {event['error']}", style="yellow", markup=False)
                case "step":
                    self._say(_step_line(event["step"], self._steps, event["metrics"]))
                    if self._task is not None:
                        self._progress.update(self._task, completed=event["step"])

    def result(self, summary: dict, run_dir: Path) -> None:
        """The table at the end, and what to do next."""
        self._console.print(_accuracy_table(summary["eval"]))
        tokens = summary["tokens"]
        self._say(
            f"{summary['steps']} steps in {summary['wall_s']:.0f} s; tokens: {tokens['generated']} generated, "
            f"{tokens['scored']} scored, {tokens['trained']} trained"
        )
        self._say(f"summary   {(run_dir / 'summary.json').absolute()}")
        self._say(f"student   {(run_dir / 'student_hf').absolute()}  (Hugging Face checkpoint)")


def _live(event: dict) -> str:
    info = event["info"]
    return (
        f"student is ready: {info['backend']} layers on {info['device']} ({info['backend_reason']}); "
        f"its log-probs and the engine's agree to {event['probe_difference']:.1g}"
    )


def _checkpoint_line(event: dict) -> str:
    return (
        f"checkpoint of step {event['step']}: {event['bytes'] / 1e6:.1f} MB in {event['seconds']:.1f} s, "
        f"of which training waited {event['waited_s']:.1f} s"
    )


def _shares(accuracy: dict[str, float | None]) -> str:
    return "  ".join(f"{domain} {_percent(value)}" for domain, value in accuracy.items())


def _percent(value: float | None) -> str:
    return "not graded" if value is None else f"{100 * value:.1f} %"


def _step_line(step: int, steps: int, metrics: dict[str, float]) -> str:
    fields = [f"{label} {form.format(metrics[name])}" for label, name, form in STEP_FIELDS if name in metrics]
    return f"step {step:>{len(str(steps))}}/{steps} | " + " | ".join(fields)


def _accuracy_table(evaluations: dict) -> Table:
    table = Table(title="accuracy on held-out prompts (standard error)")
    moments = [when for when in ("before", "after", "teacher") if when in evaluations]
    for column in ("domain", *moments):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain in sorted({domain for when in moments for domain in evaluations[when]}):
        cells = [_cell(evaluations, when, domain) for when in moments]
        table.add_row(domain, *cells)
    return table


def _cell(evaluations: dict, when: str, domain: str) -> str:
    value, error = evaluations[when].get(domain), evaluations["standard_error"][when].get(domain)
    return _percent(value) if value is None else f"{_percent(value)} ({100 * error:.1f})"


def _layout(student: StudentConfig) -> str:
    """The parallel sizes in a row: "TP 2 x PP 2 x DP 1"; those that are rarely used only where they are."""
    sizes = {"TP": student.tensor_parallel, "PP": student.pipeline_parallel, "CP": student.context_parallel}
    used = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "TP"]
    experts = f", EP {student.expert_parallel}" if student.expert_parallel > 1 else ""
    return " x ".join([*used, f"DP {student.data_parallel}"]) + experts
