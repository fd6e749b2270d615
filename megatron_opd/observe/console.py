"""What a person sees of a run: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from megatron_opd.config import Config
from megatron_opd.errors import OpdError
from megatron_opd.observe.activity import Doing, read_activity
from megatron_opd.observe.lines import banner_lines, duration, percent, result_lines, step_line
from megatron_opd.observe.recorder import follow
from megatron_opd.runtime.rundir import RunDirectory

FIRST_WAIT_S, LONGEST_SILENCE_S = 5.0, 300.0  # a log tells of a wait after the first, then each time it has doubled
RECENT_STEPS = 10  # that the estimate of the rest is made from


class _Counted(MofNCompleteColumn):
    """3/32, and nothing for what cannot be counted."""

    def render(self, task: Task) -> Text:
        return super().render(task) if task.total else Text("")


class ProgressConsole:
    """Lines and a bar. Use it as a context manager."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", max_width=40)),
            BarColumn(bar_width=16),
            _Counted(),
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

    def _warn(self, line: str) -> None:
        self._console.print(f"warning: {line}", style="yellow", markup=False)

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False)

    def _describe(self, doing: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, description=doing)


class RunConsole(ProgressConsole):
    """Prints one run."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._config: Config | None = None
        self._run: RunDirectory | None = None
        self._step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._wait, self._next_line_s = "", FIRST_WAIT_S
        self._now: TaskID | None = None  # the second bar: what is done right now

    def banner(self, config: Config, run: RunDirectory) -> None:
        """The facts that matter, before anything starts."""
        self._config, self._run = config, run
        for line in banner_lines(config, run):
            self._say(line)
        self._task = self._progress.add_task("steps", total=config.steps)
        self._now = self._progress.add_task("starting", total=None)

    def resumed(self, step: int, damaged: list[OpdError], aside: Path | None, *, finished: bool) -> None:
        """From where a run goes on, and what became of the rest."""
        for error in damaged:
            self._warn(f"a checkpoint is damaged: {error}")
        if finished:
            self._say(f"the run had finished after {step} steps; set steps=... higher to go on")
            return
        self._say(f"going on after step {step}" if step else "there is no checkpoint yet: starting from step 0")
        if aside is not None:
            self._say(f"what was done after it was moved to {aside.absolute()}")

    def job_died(self, error: OpdError) -> None:
        """That the run is started again, and why."""
        self._warn(f"{error}\nstarting all processes again from the newest checkpoint")

    def requeued(self, existing: str) -> None:
        """That a job which SLURM starts again goes on with its run."""
        self._say(f"SLURM has started this job again: going on where it stopped, whatever existing={existing} says")

    def waiting(self, names: list[str], seconds: float) -> None:
        """Called again and again: ``names`` are not ready after ``seconds``, or else the run does what it says."""
        if names:
            limit = duration(self._config.engine.start_timeout_s)
            self._show_now("servers", f"waiting for {', '.join(names)}")
            self._tell_wait(f"waiting for {', '.join(names)}", seconds, f"of at most {limit}")
        elif (doing := read_activity(self._run.activity)) is not None:
            self._wait_on_activity(doing)
        else:
            self._show_now("student", "waiting for the student's first weights")
            self._tell_wait("waiting for the student's first weights", seconds, "since the start")

    def _wait_on_activity(self, doing: Doing) -> None:
        counted = f" {doing.done}/{doing.total}" if doing.total else ""
        left = "" if doing.left_s is None else f"about {duration(doing.left_s)} to go"
        self._show_now(doing.what, doing.what, doing.done, doing.total or None)
        self._tell_wait(doing.what + counted, time.time() - doing.began, left)

    def _show_now(self, key: str, text: str, done: int = 0, total: int | None = None) -> None:
        """The second bar, which begins anew with each ``key``."""
        if key != self._wait:
            self._wait, self._next_line_s = key, FIRST_WAIT_S
            self._progress.reset(self._now, total=total, description=text)
        self._progress.update(self._now, description=text, completed=done)

    def _tell_wait(self, text: str, seconds: float, rest: str) -> None:
        """In a log, a line when a wait has become long, and then each time it has lasted twice as long."""
        if self._console.is_terminal or seconds < self._next_line_s:
            return
        self._next_line_s = seconds + min(seconds, LONGEST_SILENCE_S)
        self._say(f"{text}: {duration(seconds)}" + (f", {rest}" if rest else ""))

    def show(self, events: TextIO) -> None:
        """Print what was recorded since the last call."""
        for event in follow(events):
            match event["event"]:
                case "live":
                    info = event["info"]
                    self._say(
                        f"student is ready: {info['backend']} layers on {info['device']} ({info['backend_reason']})"
                    )
                    self._say(f"its log-probs and the engine's agree to {event['probe_difference']:.1g}")
                case "evaluating":
                    self._say(f"evaluating {event['when']} training on {event['prompts']} held-out prompts")
                case "evaluated":
                    self._say(f"accuracy {_moment(event)}: {_shares(event['accuracy'])}")
                case "evaluation_skipped":
                    self._warn(f"no evaluation after step {event['step']}: the one before still goes on")
                case "dropped":
                    self._warn(f"step {event['step']}: dropped rollouts: {'; '.join(event['reasons'])}")
                case "pausing":
                    self._say("asked to stop soon: the step under way is the last one, and is saved")
                case "checkpoint":
                    self._say(_checkpoint_line(event))
                case "checkpoint_failed":
                    self._warn(event["error"])
                case "server_hangs":
                    name, seconds = event["name"], event["seconds"]
                    self._warn(f"{name} has answered nothing for {seconds:.0f} s ({event['url']}): it is killed")
                case "server_died":
                    count = f"{event['restart']} of {event['of']}"
                    self._warn(f"{event['reason']}\nstarting {event['name']} again in {event['pause_s']:g} s, {count}")
                case "server_returned":
                    self._say(f"{event['name']} is back after {event['seconds']:.0f} s")
                case "engines_out":
                    for url, reason in event["reasons"].items():
                        self._warn(f"the engine {url} has no weights {event['version']}: {reason}")
                case "weights_sent_again":
                    self._say(f"weights {event['version']} were sent again to {', '.join(event['live'])}")
                case "stalled":
                    self._warn("\n".join([f"nothing has moved for {duration(event['seconds'])}:", *event["waits"]]))
                case "sink_left":
                    self._warn(f"{event['sink']} gets no more numbers: {event['reason']}")
                case "step":
                    self._show_step(event["step"], event["metrics"])

    def _show_step(self, step: int, metrics: dict[str, float]) -> None:
        if "time/step_s" in metrics:
            self._step_seconds.append(metrics["time/step_s"])
        left = None
        if self._step_seconds:
            left = sum(self._step_seconds) / len(self._step_seconds) * (self._config.steps - step)
        width = self._console.width if self._console.is_terminal else None
        self._say(step_line(step, metrics, self._config, left, width))
        if self._task is not None:
            self._progress.update(self._task, completed=step)

    def error(self, error: BaseException) -> None:
        """What went wrong, and where to look."""
        super().error(error)
        if self._run is not None:
            self._say(f"logs      {self._run.logs.absolute()}")
            self._say(f"report    megatron-opd view {self._run.path.absolute()}")

    def paused(self, run_dir: Path) -> None:
        """After a run that was asked to pause."""
        self._say(f"the run is saved in {run_dir.absolute()}; the same command with existing=resume goes on")

    def result(self, summary: dict, run_dir: Path) -> None:
        """The table at the end, where everything is, and what to do next."""
        self._console.print(_accuracy_table(summary["eval"]))
        for line in result_lines(summary, RunDirectory(run_dir)):
            self._say(line)


def _checkpoint_line(event: dict) -> str:
    return (
        f"checkpoint of step {event['step']}: {event['bytes'] / 1e6:.1f} MB in {event['seconds']:.1f} s, "
        f"of which training waited {event['waited_s']:.1f} s"
    )


def _moment(event: dict) -> str:
    """When, and in training with which weights: newer ones may have taken over meanwhile."""
    if event["when"] != "during":
        return event["when"]
    oldest, newest = event["weights"]
    return f"after step {event['step']}" + (f", weights {oldest} to {newest}" if oldest < newest else "")


def _shares(accuracy: dict[str, float | None]) -> str:
    return "  ".join(f"{domain} {percent(value)}" for domain, value in accuracy.items())


def _accuracy_table(evaluations: dict) -> Table:
    table = Table(title="accuracy on held-out prompts (standard error)", title_justify="left")
    moments = [when for when in ("before", "after", "teacher") if when in evaluations]
    for column in ("domain", *moments):
        table.add_column(column, justify="left" if column == "domain" else "right")
    for domain in sorted({domain for when in moments for domain in evaluations[when]}):
        cells = [_cell(evaluations, when, domain) for when in moments]
        table.add_row(domain, *cells)
    return table


def _cell(evaluations: dict, when: str, domain: str) -> str:
    value, error = evaluations[when].get(domain), evaluations["standard_error"][when].get(domain)
    return percent(value) if value is None else f"{percent(value)} ({100 * error:.1f})"
