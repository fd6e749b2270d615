"""One run on one machine: starts the processes, watches them, and leaves none behind."""

from __future__ import annotations

import json
import shlex
import time
from functools import partial
from os import SEEK_END

from megatron_opd.config import Config
from megatron_opd.errors import ProcessError
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.lines import banner_lines
from megatron_opd.observe.recorder import Recorder, follow, tell_failures
from megatron_opd.runtime.env import environment, new_token, requeued
from megatron_opd.runtime.process import Child, adopt_orphans, stop_all
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.runtime.slurm import end_steps, requeue
from megatron_opd.runtime.supervision import (
    POLL_S,
    StoppedBySignal,
    death,
    ignore_signals,
    signals_pause,
    signals_raise,
    signals_wait,
)
from megatron_opd.train.cluster import Cluster, find_cluster
from megatron_opd.train.family import Family
from megatron_opd.train.preflight import preflight
from megatron_opd.train.resume import resume
from megatron_opd.train.roles import JOBS, Role, assign_endpoints, on_nodes, own_roles, server_roles

OLD_PROCESSES_S = 30.0  # longest wait for processes of a run that was just killed


def train(config: Config, console: RunConsole) -> dict | None:
    """Run to the end and return the summary; None when it was asked to pause and has. No process is ever left.

    Raises OpdError for a wrong config, model or data file, ProcessError when a process dies, StoppedBySignal.
    """
    console.checking()
    with signals_raise():
        config = _as_requeued(config, console)
        preflight(config)
        cluster = find_cluster(config, environment())
        endpoints = assign_endpoints(config, cluster)
        goes_on = config.existing == "resume" and config.run_dir.exists()
        run = RunDirectory(config.run_dir) if goes_on else RunDirectory.create(config, endpoints)
        run_once = partial(_attempt, run, config, endpoints, cluster, console)
        restarts = config.checkpoint.restarts if config.checkpoint.every_steps else 0
        adopt_orphans()
        while not run_once(goes_on=goes_on, may_die=restarts > 0):
            goes_on, restarts = True, restarts - 1
    if run.summary.is_file():
        return json.loads(run.summary.read_text())
    if cluster.allocation and config.cluster.requeue:
        requeue(cluster.allocation.job)
    return None


def _ask_for_pause(run: RunDirectory, config: Config) -> None:
    """Let the run end with the step under way, if it can go on from there."""
    if config.checkpoint.every_steps and not run.pause_wanted.exists():
        run.pause_wanted.touch()
        Recorder(run.events, run.metrics).event("pausing")


def _attempt(
    run: RunDirectory,
    config: Config,
    endpoints: Endpoints,
    cluster: Cluster,
    console: RunConsole,
    *,
    goes_on: bool,
    may_die: bool,
) -> bool:
    """One start of all processes, of which none is left afterwards; whether the run is over, or paused.

    False when a job died and ``may_die``: the run can go on from its newest checkpoint.
    """
    recorder = Recorder(run.events, run.metrics)
    with run.occupied(OLD_PROCESSES_S):
        if goes_on and _resume(run, config, endpoints, console):
            return True
        console.banner(config, run)
        over = True
        try:
            roles = _roles(run, config, endpoints, cluster)
            with tell_failures("supervisor", recorder), signals_pause(partial(_ask_for_pause, run, config)):
                try:
                    _supervise(run, roles, config, console)
                except JobDied as error:
                    if not may_die:
                        raise
                    over = False
                    recorder.event("job_died", reason=str(error))
                    console.job_died(error)
        except StoppedBySignal as stop:
            recorder.event("stopped", signal=str(stop))
            raise
        finally:
            console.stopping()
            if over:
                ignore_signals()  # the clean-up is not interrupted
                _end_all(cluster)
            else:
                with signals_wait():
                    _end_all(cluster)
    return over


def _end_all(cluster: Cluster) -> None:
    stop_all()
    if cluster.allocation:
        end_steps(cluster.allocation.job)  # of srun commands that had to be killed


def dry_run(config: Config) -> list[str]:
    """What ``train`` would start: the facts, the place of every role, and every command. Nothing is started.

    Raises OpdError for all that ``train`` would refuse before it starts anything.
    """
    preflight(config)
    cluster, run = find_cluster(config, environment()), RunDirectory(config.run_dir)
    roles = _roles(run, config, assign_endpoints(config, cluster), cluster)
    lines = [*banner_lines(config, run), "", "places"]
    lines += [f"  {role:16} {place.told()}" for role, place in cluster.places.items()] or ["  all on this machine"]
    lines += ["", "commands; the environment of each also has its keys and threads"]
    return lines + [line for role in roles for line in (f"# {role.name}", shlex.join(role.argv))]


def _roles(run: RunDirectory, config: Config, endpoints: Endpoints, cluster: Cluster) -> list[Role]:
    token = new_token()
    servers = server_roles(cluster.resolved(config), endpoints)
    return on_nodes([*servers, *own_roles(run, config, endpoints, token, cluster)], cluster, token)


def _as_requeued(config: Config, console: RunConsole) -> Config:
    """A job that SLURM starts again goes on with its run, whatever its command says about existing folders."""
    if not requeued() or not config.run_dir.exists() or config.existing == "resume":
        return config
    console.requeued(config.existing)
    return config.model_copy(update={"existing": "resume"})


def _resume(run: RunDirectory, config: Config, endpoints: Endpoints, console: RunConsole) -> bool:
    """Prepare a run that stopped for going on; true when it had finished."""
    resumed = resume(run, config, endpoints)
    console.resumed(resumed.step, resumed.damaged, resumed.aside, finished=resumed.finished)
    if not resumed.finished:
        damaged = [str(error) for error in resumed.damaged]
        Recorder(run.events, run.metrics).event("resumed", step=resumed.step, damaged=damaged)
    return resumed.finished


def _supervise(run: RunDirectory, roles: list[Role], config: Config, console: RunConsole) -> None:
    """Start ``roles`` and return when coordinator and student have both ended well. Raises ProcessError."""
    began = time.monotonic()
    working = set(JOBS)
    with run.events.open() as events:
        before = events.seek(0, SEEK_END)  # a resumed run has told these already
        family = Family(roles, config.engine, run.logs, Recorder(run.events, run.metrics), console)
        while working:
            console.show(events)
            ended = family.look()
            finished = {child.name for child in ended if child.name in JOBS and child.returncode == 0}
            failed = [child for child in ended if child.name not in finished]
            if failed:
                raise _death(failed, run, before)
            working -= finished
            console.waiting(family.waiting, time.monotonic() - began)
            time.sleep(POLL_S)
        console.show(events)


class JobDied(ProcessError):
    """The coordinator or the student ended without a word, after the run had begun: it may be worth another start."""


def _death(failed: list[Child], run: RunDirectory, before: int) -> ProcessError:
    """The error to show: a dead server's, since the others only suffer from it; else of the one that could tell it.

    before: where this start's events begin in the file.
    """
    with run.events.open() as file:
        file.seek(before)
        told = list(follow(file))
    said = {event["role"]: event["error"] for event in told if event["event"] == "failed"}
    child = min(failed, key=lambda child: (child.name in JOBS, child.name not in said))
    if child.name in said:
        return ProcessError(f"{child.name} stopped the run: {said[child.name]}")
    error = death(child)
    had_begun = any(event["event"] == "live" for event in told)
    return JobDied(error.what, where=error.where, got=error.got) if child.name in JOBS and had_begun else error
