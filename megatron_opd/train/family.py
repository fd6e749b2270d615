"""The processes of a run. A server that dies after it has worked is started again, at the same address.

One that hangs, which keeps its port and answers nothing, is killed, and then it is one that died.

Rollout engines come back with the weights of the model's folder: the coordinator leaves them out until they have others
(``coordinator/engines.py``). Teachers prove themselves once more before they are asked (``teachers/handshake.py``).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import EngineConfig
from megatron_opd.observe.console import RunConsole
from megatron_opd.observe.recorder import Recorder
from megatron_opd.runtime.process import Child, end_session, start
from megatron_opd.runtime.pulse import ASK_EVERY_S, Pulse
from megatron_opd.runtime.supervision import answers, death, late
from megatron_opd.train.roles import JOBS, Role

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # before a dead server is started again; doubled each time
ASKING_THREADS = 16  # a question to a server that hangs keeps one of them for seconds


@dataclass
class _Member:
    """One role and the process that plays it now."""

    role: Role
    child: Child
    began: float  # this start of it, monotonic
    ready: bool  # answers, or cannot be asked
    proven: bool = False  # was ready once: what started once can start again
    restarts: int = 0
    due: float | None = None  # when it is to be started again
    pulse: Pulse | None = None  # of a server that is ready

    @property
    def ended(self) -> bool:
        return self.due is None and self.child.returncode is not None


class Family:
    """Starts ``roles`` at once. ``look`` again and again."""

    def __init__(
        self, roles: Sequence[Role], config: EngineConfig, logs: Path, recorder: Recorder, console: RunConsole
    ) -> None:
        self._config, self._logs, self._recorder, self._console = config, logs, recorder, console
        self._began = time.monotonic()
        self._threads = ThreadPoolExecutor(ASKING_THREADS, thread_name_prefix="pulse")
        self._members = [_Member(role, self._start(role), self._began, ready=role.ready_url is None) for role in roles]

    def look(self) -> list[Child]:
        """Start again what may be; processes that ended for good, the jobs that ended well among them.

        Raises ProcessError when a server is not ready in time.
        """
        for member in self._members:
            self._end_if_it_hangs(member)
            if member.ended and self._may_return(member):
                self._plan(member)
            elif member.due is not None and time.monotonic() >= member.due:
                member.child, member.began, member.due = self._start(member.role), time.monotonic(), None
        self._await_ready()
        return [member.child for member in self._members if member.ended]

    @property
    def waiting(self) -> list[str]:
        """Names of those that have never been ready."""
        return sorted(member.role.name for member in self._members if not (member.ready or member.proven))

    def _start(self, role: Role) -> Child:
        return start(role.name, role.argv, role.environment, self._logs / f"{role.name}.log")

    def _end_if_it_hangs(self, member: _Member) -> None:
        """kill -9 for a server that has answered no question for ``hang_s``, and for all that it started."""
        if member.pulse is None or member.ended:
            return
        silence = member.pulse.silence_s(time.monotonic())
        if silence >= self._config.hang_s:
            self._recorder.event(
                "server_hangs", name=member.role.name, url=member.role.ready_url, seconds=round(silence, 1)
            )
            end_session(member.child)

    def _may_return(self, member: _Member) -> bool:
        return member.role.name not in JOBS and member.proven and member.restarts < self._config.restarts

    def _plan(self, member: _Member) -> None:
        """Clear away what a dead server left, which may hold its port, and say why and when it comes back."""
        reason = death(member.child)
        end_session(member.child)
        pause = min(FIRST_PAUSE_S * 2**member.restarts, LONGEST_PAUSE_S)
        member.restarts += 1
        member.ready, member.pulse, member.due = False, None, time.monotonic() + pause
        self._recorder.event(
            "server_died",
            name=member.role.name,
            reason=str(reason),
            restart=member.restarts,
            of=self._config.restarts,
            pause_s=pause,
        )

    def _await_ready(self) -> None:
        now, limit_s = time.monotonic(), self._config.start_timeout_s
        starting = [member for member in self._members if member.due is None and not (member.ready or member.ended)]
        for member in starting:
            if not answers(member.role.ready_url):
                continue
            member.ready = True
            if member.role.name not in JOBS:
                every_s = min(ASK_EVERY_S, self._config.hang_s / 4)
                member.pulse = Pulse(member.role.ready_url, self._threads, every_s)
            if member.proven:
                seconds = round(now - member.began, 1)
                self._recorder.event("server_returned", name=member.role.name, seconds=seconds)
            else:
                member.proven = True
                self._console.ready(member.role.name, now - self._began)
        if slow := [member.child for member in starting if not member.ready and now - member.began > limit_s]:
            raise late(slow, limit_s)
