"""What supervisors of processes share: signals that ask to stop, readiness, and errors that show a log's last lines."""

from __future__ import annotations

import asyncio
import http.client
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from megatron_opd.errors import ProcessError
from megatron_opd.runtime.process import Child

POLL_S = 0.25
ANSWER_S = 2.0  # longest wait for an answer about readiness
STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


PAUSING_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2)  # schedulers send one before a time limit or a preemption


class StoppedBySignal(BaseException):
    """The user, or the scheduler, asked the run to stop."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)


def ignore_signals() -> None:
    """From now on nobody interrupts: for the clean-up."""
    for number in STOPPING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _handled(numbers: Sequence[signal.Signals], handler: Callable[[int, object], None]) -> Iterator[None]:
    """``handler`` takes these signals within the block."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Turn the signals that ask a run to stop into StoppedBySignal, once."""

    def stop(number: int, _: object) -> None:
        ignore_signals()
        raise StoppedBySignal(number)

    with _handled(STOPPING_SIGNALS, stop):
        yield


@contextmanager
def signals_pause(ask: Callable[[], None]) -> Iterator[None]:
    """Call ``ask`` when a scheduler tells that the run will have to stop soon."""
    with _handled(PAUSING_SIGNALS, lambda *_: ask()):
        yield


@contextmanager
def signals_wait() -> Iterator[None]:
    """The block is not interrupted: a signal that comes in it is raised as StoppedBySignal at its end."""
    seen: list[int] = []
    with _handled(STOPPING_SIGNALS, lambda number, _: seen.append(number)):
        yield
    if seen:
        raise StoppedBySignal(seen[0])


@contextmanager
def signals_cancel() -> Iterator[None]:
    """The same inside a coroutine, where an exception out of a handler could get lost: the current task is cancelled,
    cleans up without further interruption, and StoppedBySignal is raised at the end of the block."""
    task, loop, seen = asyncio.current_task(), asyncio.get_running_loop(), []

    def stop(number: int) -> None:
        if not seen:
            task.cancel()
        seen.append(number)

    previous = {number: signal.getsignal(number) for number in STOPPING_SIGNALS}
    for number in STOPPING_SIGNALS:
        loop.add_signal_handler(number, stop, number)
    try:
        yield
    except asyncio.CancelledError:
        if not seen:
            raise
    finally:
        for number, handler in previous.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
    if seen:
        raise StoppedBySignal(seen[0])


def answers(url: str) -> bool:
    """Whether a GET of ``url`` gives 200 right now."""
    return _status(url) == 200


def responds(url: str, timeout_s: float) -> bool:
    """Whether a GET of ``url`` gives anything: a server that refuses, such as one that is paused, does not hang."""
    return _status(url, timeout_s) is not None


def _status(url: str, timeout_s: float = ANSWER_S) -> int | None:
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout_s)
    try:
        connection.request("GET", address.path)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def await_ready(child: Child, url: str, limit_s: float) -> float:
    """Wait until ``url`` answers 200; the seconds it took. Raises ProcessError when ``child`` dies or is late."""
    began = time.monotonic()
    while not answers(url):
        if child.returncode is not None:
            raise death(child)
        if time.monotonic() - began > limit_s:
            raise late([child], limit_s)
        time.sleep(POLL_S)
    return time.monotonic() - began


def death(child: Child) -> ProcessError:
    """The error of a process that ended though it should not have."""
    code = child.returncode
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    lines = child.last_lines().replace("\n", "\n    ")
    return ProcessError(f"{child.name} died", where=child.log.absolute(), got=f"{how}; its last lines:\n    {lines}")


def late(children: Sequence[Child], limit_s: float) -> ProcessError:
    """The error of processes that are not ready in time; it shows the log of the first."""
    lines = children[0].last_lines().replace("\n", "\n    ")
    return ProcessError(
        f"{', '.join(child.name for child in children)} did not become ready",
        where=children[0].log.absolute(),
        got=f"the last lines:\n    {lines}",
        expected=f"ready within engine.start_timeout_s = {limit_s:g} s",
    )
