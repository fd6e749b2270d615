"""Says who waits for whom when nothing has moved for a while. It only tells; nobody is ended for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Hashable

from megatron_opd.observe.recorder import Recorder

logger = logging.getLogger(__name__)
LOOK_S = 5.0


class Watchdog:
    """Notices silence, by counters that change whenever something moves.

    dog = Watchdog(limit_s=120, now=0)
    dog.look(moved=(1, 4), now=100)  # None: something has moved
    dog.look(moved=(1, 4), now=219)  # None: nothing has, but not for long
    dog.look(moved=(1, 4), now=220)  # 120.0 seconds; the next time after 240
    """

    def __init__(self, limit_s: float, now: float) -> None:
        self._limit_s = self._next_s = limit_s
        self._since = now
        self._moved: Hashable = None

    def look(self, moved: Hashable, now: float) -> float | None:
        """Seconds of silence when they have reached the limit, and each time they have doubled; else None."""
        if moved != self._moved:
            self._moved, self._since, self._next_s = moved, now, self._limit_s
            return None
        silence = now - self._since
        if silence < self._next_s:
            return None
        self._next_s = 2 * silence
        return silence


async def watch(
    limit_s: float, moved: Callable[[], Hashable], waits: Callable[[], list[str]], recorder: Recorder
) -> None:
    """Look again and again, and tell. Never returns."""
    dog = Watchdog(limit_s, time.monotonic())
    while True:
        await asyncio.sleep(min(LOOK_S, limit_s / 4))
        silence = dog.look(moved(), time.monotonic())
        if silence is not None:
            lines = waits() or ["nobody waits for a server, a verifier or the student: the coordinator itself is busy"]
            logger.warning("nothing has moved for %.0f s: %s", silence, "; ".join(lines))
            recorder.event("stalled", seconds=round(silence, 1), waits=lines)
