"""What of an engine's memory is given back, so that a trainer on the same GPU can use it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Literal

from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import EngineError

Part = Literal["weights", "kv_cache", "cuda_graph"]
LENT: tuple[Part, ...] = ("weights", "kv_cache")  # what a trainer on the same GPU gets


class MemoryOccupation:
    """State of one engine's memory, kept on our side: taking again what was not released ends the whole server.

        held --release--> released --resume--> held
        any  --the engine has been started again--> held

    for each part on its own. Frees memory only on a GPU, of a server that was started with ``--enable-memory-saver``.
    What weights hold after a resume is not said: they have to be sent again before the engine serves.

    An engine that has been started again is known by its weight version, which is not that at the last release: so
    release only engines that have been given a version.
    """

    def __init__(self, engine: WeightClient) -> None:
        self._engine = engine
        self._released: set[Part] = set()
        self._lost = False  # whether a call failed
        self._version: str | None = None  # of the weights when something was released

    @property
    def released(self) -> frozenset[Part]:
        """Parts that are given back."""
        return frozenset(self._released)

    async def release(self, parts: Iterable[Part]) -> None:
        """Give back those of ``parts`` that are held. Raises EngineError.

        Only for a server without requests: one that runs, or comes in before ``resume``, ends the server.
        """
        async with self._certain() as version:
            if wanted := [part for part in parts if part not in self._released]:
                self._version = version
                await self._engine.release_memory(wanted)
                self._released |= set(wanted)

    async def resume(self, parts: Iterable[Part]) -> None:
        """Take again those of ``parts`` that are given back. Raises EngineError."""
        async with self._certain():
            if wanted := [part for part in parts if part in self._released]:
                await self._engine.resume_memory(wanted)
                self._released -= set(wanted)

    @asynccontextmanager
    async def _certain(self) -> AsyncIterator[str]:
        """A call that fails leaves it open what the server has done; then there is no further one to that server."""
        version = await self._engine.weight_version()
        if (self._released or self._lost) and version != self._version:
            self._released, self._lost = set(), False
        if self._lost:
            raise EngineError(
                "It is not known what memory the engine has given back",
                where=self._engine.url,
                got="an earlier call that failed",
                fix="start the engine again",
            )
        self._lost = True
        yield version
        self._lost = False
