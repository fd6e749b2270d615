"""Real servers for as long as a test needs them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from megatron_opd.runtime.process import start
from megatron_opd.runtime.supervision import answers
from megatron_opd.train.roles import Role

from runs import START_LIMIT_S


@contextmanager
def running(roles: list[Role], logs: Path) -> Iterator[None]:
    """These servers, once all of them answer; they are killed afterwards."""
    children = [start(role.name, role.argv, role.environment, logs / f"{role.name}.log") for role in roles]
    try:
        deadline = time.monotonic() + START_LIMIT_S
        for role, child in zip(roles, children, strict=True):
            while not answers(role.ready_url):
                assert child.returncode is None and time.monotonic() < deadline, child.last_lines(40)
                time.sleep(0.5)
        yield
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):  # one that died while it started
                for process in [*psutil.Process(child.process.pid).children(recursive=True), child.process]:
                    process.kill()
