"""Ranks as forks of a process that has imported everything: a dozen layouts for the price of one import."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

MOST_PROCESSES = 4
DEADLINE_S = 300.0  # of one layout, also where others use the cores


def run_layouts(layouts: dict[str, int], work: Callable[[str], None], logs: Path) -> None:
    """Call ``work(name)`` on each rank of each layout; as many at once as there may be processes.

    layouts: ranks by name. What the ranks print is in ``logs``/name.log. Raises RuntimeError with the log of a layout
    that failed, when none of its ranks is left.
    """
    waiting, running = list(layouts), {}
    try:
        while waiting or running:
            busy = sum(len(children) for children in running.values())
            if waiting and (not running or busy + layouts[waiting[0]] <= MOST_PROCESSES):
                name = waiting.pop(0)
                running[name] = _fork(name, layouts[name], work, logs / f"{name}.log")
                continue
            for name in [name for name, children in running.items() if _all_ended(name, children, logs)]:
                del running[name]
            time.sleep(0.05)
    finally:
        for children in running.values():
            _kill(children)


def _fork(name: str, ranks: int, work: Callable[[str], None], log: Path) -> dict[int, float]:
    """Process ids, and when each has to be done."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            _be_rank(rank, ranks, port, log, lambda: work(name))
        children[child] = time.monotonic() + DEADLINE_S
    return children


def _be_rank(rank: int, ranks: int, port: int, log: Path, work: Callable[[], None]) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in place.items()})
        work()
        code = 0
    except BaseException:  # noqa: BLE001 - a fork must never return into the parent's code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _all_ended(name: str, children: dict[int, float], logs: Path) -> bool:
    """Take ended ranks out of ``children``; whether none is left. The first failure ends the others of its layout."""
    for child, deadline in list(children.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        late = not ended and time.monotonic() > deadline
        if ended:
            del children[child]
        if status != 0 or late:
            _kill(children)
            end = (logs / f"{name}.log").read_text()[-6000:]
            raise RuntimeError(f"layout {name} {'took too long' if late else 'failed'}:\n{end}")
    return not children


def _kill(children: dict[int, float]) -> None:
    for child in list(children):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        del children[child]
