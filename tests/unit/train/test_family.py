"""Servers that die are started again; tiny web servers take the place of engines."""

from __future__ import annotations

import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megatron_opd.config import EngineConfig
from megatron_opd.errors import ProcessError
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.recorder import Recorder, read_events
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import Child, adopt_orphans, end_session
from megatron_opd.train import family as family_module
from megatron_opd.train.family import Family
from megatron_opd.train.roles import Role

from runs import lives

# Like an engine it has a child of its own, which holds on to the port when its parent is killed.
SERVER = """
import http.server, os, sys, time
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler)
if os.fork() == 0:
    time.sleep(600)
server.serve_forever()
"""


@pytest.fixture
def family(tmp_path: Path, monkeypatch) -> Iterator[Callable[..., Family]]:
    monkeypatch.setattr(family_module, "FIRST_PAUSE_S", 0.01)
    adopt_orphans()
    made: list[Family] = []

    def make(*roles: Role, **config: object) -> Family:
        recorder = Recorder(tmp_path / "events", tmp_path / "metrics")
        (tmp_path / "events").touch()
        made.append(Family(roles, EngineConfig(**config), tmp_path, recorder, RunConsole()))
        return made[-1]

    yield make
    for one in made:
        for member in one._members:
            end_session(member.child)


def server(name: str = "rollout") -> Role:
    port = free_port()
    return Role(name, [sys.executable, "-c", SERVER, str(port)], {}, f"http://127.0.0.1:{port}/")


def until(family: Family, done: Callable[[], bool]) -> list[Child]:
    deadline = time.monotonic() + 60
    while not done() and not (ended := family.look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return family.look() if done() else ended


def kill(family: Family) -> psutil.Process:
    process = family._members[0].child.process
    process.kill()
    process.wait()
    return process


def events(tmp_path: Path) -> list[str]:
    return [event["event"] for event in read_events(tmp_path / "events")]


def test_a_server_that_was_ready_is_started_again_at_its_port_until_it_has_died_too_often(family, tmp_path) -> None:
    running = family(server(), restarts=2)
    assert not until(running, lambda: not running.waiting)
    for number in (1, 2):
        killed = kill(running)
        assert not until(running, lambda number=number: events(tmp_path).count("server_returned") == number)
        assert running._members[0].child.process.pid != killed.pid
    kill(running)
    (ended,) = running.look()
    assert ended.name == "rollout" and events(tmp_path).count("server_died") == 2
    told = read_events(tmp_path / "events")[0]
    assert (told["name"], told["restart"], told["of"]) == ("rollout", 1, 2) and "SIGKILL" in told["reason"]


def test_a_server_that_hangs_is_killed_with_its_children_and_started_again(family, tmp_path) -> None:
    running = family(server(), hang_s=2, restarts=1)
    assert not until(running, lambda: not running.waiting)
    process = running._members[0].child.process
    (child,) = psutil.Process(process.pid).children()
    time.sleep(3)
    assert running.look() == [] and events(tmp_path) == []  # longer than hang_s, but it answers
    process.send_signal(signal.SIGSTOP)
    assert not until(running, lambda: events(tmp_path).count("server_returned") == 1)
    assert events(tmp_path) == ["server_hangs", "server_died", "server_returned"]
    told = read_events(tmp_path / "events")[0]
    assert told["name"] == "rollout" and 2 <= told["seconds"] < 12
    assert process.returncode == -signal.SIGKILL and not lives(child)
    running._members[0].child.process.send_signal(signal.SIGSTOP)
    (ended,) = until(running, lambda: False)  # it has been started again as often as it may be
    assert ended.name == "rollout" and ended.returncode == -signal.SIGKILL


def test_one_that_never_worked_and_a_job_are_not_started_again(family, tmp_path) -> None:
    broken = Role("rollout", [sys.executable, "-c", "raise SystemExit(3)"], {}, "http://127.0.0.1:1/")
    running = family(broken)
    (ended,) = until(running, lambda: False)
    assert ended.returncode == 3
    running = family(server("coordinator"))
    until(running, lambda: not running.waiting)
    kill(running)
    assert [child.name for child in running.look()] == ["coordinator"]
    assert events(tmp_path) == []


def test_one_that_does_not_become_ready_again_in_time_is_told(family) -> None:
    role = server()
    running = family(role, start_timeout_s=0.3)
    running._members[0].proven = True
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(role.argv[-1])))
        role.argv[2] = "import time; time.sleep(60)"
        kill(running)
        with pytest.raises(ProcessError, match="did not become ready"):
            until(running, lambda: False)
