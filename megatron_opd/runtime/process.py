"""Child processes: started with a log file of their own, and never left running."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_opd.runtime.env import launcher

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
ENDED_S = 10.0  # longest wait for a killed process to be gone
READS = 50  # of an environment that is empty: for a second
MARK = "OPD_STARTED_AS"  # environment variable that all have which one ``start`` has started, in whatever session


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to send this signal to this process when the thread that started it is gone (Linux).

    A rank takes seconds to import what it needs before it can ask: one whose launcher is gone by then ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number)
    if launcher() not in (None, os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def adopt_orphans() -> None:
    """Become the parent of grandchildren whose own parent dies, so that ``stop_all`` still finds them (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1)


@dataclass(frozen=True)
class Child:
    """A started process."""

    name: str
    process: subprocess.Popen
    log: Path
    mark: str = ""

    @property
    def returncode(self) -> int | None:
        """None while it runs; negative: ended by that signal."""
        return self.process.poll()

    def last_lines(self, count: int = 15) -> str:
        """The end of its log, for an error message."""
        with self.log.open(errors="replace") as file:
            return "".join(deque(file, maxlen=count)).rstrip() or "(its log is empty)"


def start(name: str, argv: list[str], environment: dict[str, str], log: Path) -> Child:
    """Start ``argv`` in a session of its own, output to ``log``; a terminal's Ctrl-C reaches only the supervisor."""
    mark = uuid.uuid4().hex
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            env=environment | {MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    return Child(name, process, log, mark)


def end_session(child: Child) -> None:
    """kill -9 for what is left of a process and of all that it started in its session (``adopt_orphans`` before)."""
    for process in _descendants():
        if _session(process) == child.process.pid:
            _send(process, signal.SIGKILL)
    deadline = time.monotonic() + ENDED_S
    while any(_session(process) == child.process.pid for process in _descendants()) and time.monotonic() < deadline:
        time.sleep(0.05)


def _session(process: psutil.Process) -> int | None:
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return None


def stop_all(grace_s: float = 5.0) -> None:
    """End every descendant of this process: SIGTERM, and SIGKILL after ``grace_s`` seconds for what is left.

    Loops until no descendant exists, because a dying process may still start another.
    """
    _stop(_descendants, grace_s)


def stop(child: Child, grace_s: float = 5.0) -> None:
    """The same for one child and all that came of it, also in sessions of their own (``adopt_orphans`` before)."""
    _stop(lambda: [process for process in _descendants() if _mark(process) == child.mark], grace_s)


def _stop(find: Callable[[], list[psutil.Process]], grace_s: float) -> None:
    deadline = time.monotonic() + grace_s
    asked: set[int] = set()
    while living := find():
        late = time.monotonic() > deadline
        for process in living:
            if late or process.pid not in asked:
                asked.add(process.pid)
                _send(process, signal.SIGKILL if late else signal.SIGTERM)
        psutil.wait_procs(living, timeout=0.2)


def _mark(process: psutil.Process) -> str | None:
    for _ in range(READS):
        try:
            environment = process.environ()
        except (psutil.Error, OSError):  # it has just ended: there is nothing left to read
            return None
        if environment:
            return environment.get(MARK)
        time.sleep(0.02)  # it is about to become another program, and has none for a moment
    return None


def _descendants() -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if _alive(child)]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # it ended by itself meanwhile, which is what was wanted
