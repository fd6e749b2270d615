"""When the student is evaluated in training: beside it where steps overlap, else between two steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine


class Evaluations:
    """One evaluation at a time. ``evaluate`` makes the one after so many steps, ``skipped`` is told of those left out.

    every: steps between two of them, 0 for none; beside: whether training goes on meanwhile.
    """

    def __init__(
        self,
        every: int,
        evaluate: Callable[[int], Coroutine[None, None, None]],
        skipped: Callable[[int], None],
        *,
        beside: bool,
    ) -> None:
        self._every, self._evaluate, self._skipped, self._beside = every, evaluate, skipped, beside
        self._task: asyncio.Task[None] | None = None

    async def after(self, step: int) -> None:
        """``step`` steps are done, and more will follow. Raises what went wrong in an evaluation that has ended."""
        if self._task is not None and self._task.done():
            self._task.result()
            self._task = None
        if not self._every or step % self._every:
            return
        if not self._beside:
            await self._evaluate(step)
        elif self._task is None:
            self._task = asyncio.create_task(self._evaluate(step), name=f"evaluation after step {step}")
        else:
            self._skipped(step)

    async def finish(self) -> None:
        """Wait for the one under way, and raise what went wrong in it."""
        if self._task is not None:
            await self._task

    async def close(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
