"""One run on one machine: starts the processes, watches them, and leaves none behind."""

from __future__ import annotations

import http.client
import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from megatron_opd.config import Config
from megatron_opd.errors import ProcessError
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.recorder import read_events
from megatron_opd.runtime.env import new_token
from megatron_opd.runtime.process import Child, adopt_orphans, start, stop_all
from megatron_opd.runtime.rundir import RunDirectory
from megatron_opd.train.preflight import preflight
from megatron_opd.train.roles import Role, assign_endpoints, own_roles, server_roles

POLL_S = 0.25
JOBS = ("coordinator", "student")  # these end by themselves; servers must not
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StoppedBySignal(BaseException):
    """The user, or the scheduler, asked the run to stop."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def train(config: Config, console: RunConsole) -> dict:
    """Run to the end and return the summary. However it ends, no process is left.

    Raises OpdError for a wrong config, model or data file, ProcessError when a process dies, StoppedBySignal.
    """
    console.checking()
    with _signals_raise():
        preflight(config)
        endpoints = assign_endpoints(config)
        run = RunDirectory.create(config, endpoints)
        console.banner(config, run)
        adopt_orphans()
        try:
            roles = server_roles(config, endpoints) + own_roles(run, endpoints, new_token())
            _supervise(run, roles, config, console)
        finally:
            _ignore_signals()  # the clean-up is not interrupted
            console.stopping()
            stop_all()
    return json.loads(run.summary.read_text())


def _supervise(run: RunDirectory, roles: list[Role], config: Config, console: RunConsole) -> None:
    """Start ``roles`` and return when coordinator and student have both ended well. Raises ProcessError."""
    began = time.monotonic()
    children = [start(role.name, role.argv, role.environment, run.logs / f"{role.name}.log") for role in roles]
    starting = {role.name: role.ready_url for role in roles if role.ready_url}
    working = set(JOBS)
    with run.events.open() as events:
        while working:
            console.show(events)
            ended = [child for child in children if child.returncode is not None]
            finished = {child.name for child in ended if child.name in JOBS and child.returncode == 0}
            failed = [child for child in ended if child.name not in finished]
            if failed:
                raise _death(failed, run)
            working -= finished
            for name in [name for name, url in starting.items() if name in finished or answers(url)]:
                del starting[name]
                console.ready(name, time.monotonic() - began)
            if starting and time.monotonic() - began > config.engine.start_timeout_s:
                raise _late([child for child in children if child.name in starting], config.engine.start_timeout_s)
            time.sleep(POLL_S)
        console.show(events)


def answers(url: str) -> bool:
    """Whether a GET of ``url`` gives 200 right now."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=2)
    try:
        connection.request("GET", address.path)
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _death(failed: list[Child], run: RunDirectory) -> ProcessError:
    """The error to show: a dead server's, since the others only suffer from it; else of the one that could tell it."""
    said = {event["role"]: event["error"] for event in read_events(run.events) if event["event"] == "failed"}
    child = min(failed, key=lambda child: (child.name in JOBS, child.name not in said))
    if child.name in said:
        return ProcessError(f"{child.name} stopped the run: {said[child.name]}")
    code = child.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = child.last_lines().replace("\n", "\n    ")
    return ProcessError(f"{child.name} died", where=child.log.absolute(), got=f"{how}; its last lines:\n    {lines}")


def _late(children: list[Child], limit_s: float) -> ProcessError:
    lines = children[0].last_lines().replace("\n", "\n    ")
    return ProcessError(
        f"{', '.join(child.name for child in children)} did not become ready",
        where=children[0].log.absolute(),
        got=f"the last lines:\n    {lines}",
        expected=f"ready within engine.start_timeout_s = {limit_s:g} s",
    )


def _ignore_signals() -> None:
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Turn the signals that ask a run to stop into StoppedBySignal, once."""

    def stop(number: int, _: object) -> None:
        _ignore_signals()
        raise StoppedBySignal(number)

    previous = {number: signal.signal(number, stop) for number in STOPPING_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
