"""An event loop whose clock jumps to the next timer: seconds of waiting cost nothing, and figures are exact."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


class _Jumping(selectors.DefaultSelector):
    """Never waits: where nothing is ready, the time that it was to wait has passed."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for somebody else"
            self.now += max(timeout, 0.0)
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Runs what would go to a thread at once, since a thread's time is no time of this clock."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now

    def run_in_executor(self, executor: object, function: Callable[..., Any], *arguments: Any) -> asyncio.Future:
        future = self.create_future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:  # noqa: BLE001, what a thread raises is raised where it is awaited
            future.set_exception(error)
        return future


def run_in_virtual_time(main: Coroutine[None, None, Result]) -> Result:
    """The result of ``main``. AssertionError when everybody waits for somebody else."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
