"""The buffer between rollouts and training: steps whose rollouts are drawn while the student trains on earlier ones.

With weights k live, steps k .. k + max_staleness may be open, and no others: that is the back-pressure, and it bounds
the memory. A prompt belongs to its step from the moment it is drawn, so batches hold the same prompts in the same order
however long single responses take, and long responses are not thinned out. At max_staleness 0 one step is open at a
time, and it is drawn with weights k alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from megatron_opd.coordinator.stages import StepRollouts
from megatron_opd.data.inputs import Stream
from megatron_opd.recipe.objective import StepObjective
from megatron_opd.records import PackedBatch, Prompt


class Draws:
    """Which prompts were drawn for which step, and those that are to be drawn before any new one.

    draws = Draws(stream, first_group=0, again=[])
    draws.take(step=0, count=2)  # [(0, first prompt), (1, second prompt)]
    draws.in_flight(step=0)      # their names: a run that goes on from here must draw them again
    draws.in_flight(step=1)      # []: step 0 is done
    """

    def __init__(self, stream: Stream, first_group: int, again: Sequence[str]) -> None:
        """``again``: names of prompts that were drawn, but not trained, before the run was interrupted."""
        self.next_group = first_group
        self._stream = stream
        self._again = [(name, stream.find(name)) for name in again]
        self._drawn: dict[int, list[tuple[str, Prompt]]] = {}

    def take(self, step: int, count: int) -> list[tuple[int, Prompt]]:
        """``count`` prompts for ``step``, each with the number of its group of rollouts."""
        named, self._again = self._again[:count], self._again[count:]
        named += self._stream.draw(count - len(named))
        self._drawn.setdefault(step, []).extend(named)
        first, self.next_group = self.next_group, self.next_group + count
        return [(group, prompt) for group, (_, prompt) in enumerate(named, start=first)]

    def in_flight(self, step: int) -> list[str]:
        """Names of the prompts that were drawn and are not trained by step ``step``; earlier ones are let go."""
        self._drawn = {number: named for number, named in self._drawn.items() if number >= step}
        opened = [name for number in sorted(self._drawn) for name, _ in self._drawn[number]]
        return [*opened, *(name for name, _ in self._again)]


@dataclass(frozen=True, eq=False)
class Prepared:
    """One step, ready to be offered to the student."""

    rollouts: StepRollouts
    objective: StepObjective
    batches: list[PackedBatch]  # one for each data-parallel rank
    seconds: float  # from its first draw
    finished: float  # monotonic time


class StepBuffer:
    """Prepares steps side by side and hands them out in order. ``prepare``: makes one step, whenever it is started."""

    def __init__(self, prepare: Callable[[int], Coroutine[None, None, Prepared]], first: int, steps: int) -> None:
        """``first``: number of the first step; ``steps``: number at which the run ends."""
        self._prepare = prepare
        self._next, self._steps = first, steps
        self._open: dict[int, asyncio.Task[Prepared]] = {}

    def begin(self, last: int) -> None:
        """Start every step up to number ``last`` that is not started and that the run will have."""
        for step in range(self._next, min(last + 1, self._steps)):
            self._open[step] = asyncio.create_task(self._prepare(step), name=f"step {step}")
            self._next = step + 1

    async def take(self, step: int) -> Prepared:
        """The step as soon as it is complete. Raises what went wrong while it was prepared."""
        prepared = await self._open[step]
        del self._open[step]
        return prepared

    @property
    def ready(self) -> int:
        """Steps that are complete and not taken."""
        return sum(task.done() for task in self._open.values())

    async def close(self) -> None:
        """Give up what is under way."""
        for task in self._open.values():
            task.cancel()
        if self._open:
            await asyncio.wait(self._open.values())
        self._open.clear()


def buffered_s(prepared: Prepared) -> float:
    """How long a step lay ready; 0 where the student waited for it."""
    return time.monotonic() - prepared.finished
