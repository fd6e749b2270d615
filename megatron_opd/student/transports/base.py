"""What all ways of transport have in common."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.weights import WeightBucket, WeightClient
from megatron_opd.errors import OpdError
from megatron_opd.runtime.http import TransientError

NamedTensors = list[tuple[str, torch.Tensor]]
Answer = TypeVar("Answer")
DEPARTURE_S = 0.005  # for a request to leave before gathering keeps this thread busy
ANSWER_S = 10.0  # for an engine to answer what costs it nothing


@dataclass(frozen=True)
class Place:
    """Where trainer and engines meet."""

    host: str  # of the trainer's first rank, as the engines reach it
    port: int
    folder: Path  # shared with the engines, for ``disk``


@dataclass
class Sent:
    """What became of one attempt to send the weights to some engines."""

    bytes: int = 0
    failed: dict[WeightClient, OpdError] = field(default_factory=dict)  # these do not have them


class Transport(ABC):
    """One way; it lives on the trainer's first rank."""

    def __init__(self, config: RefreshConfig, place: Place) -> None:
        self._config, self._place = config, place
        self._ranks: dict[WeightClient, int] = {}  # of each engine, as far as they were asked for

    @abstractmethod
    async def send(
        self, engines: Sequence[WeightClient], weights: Iterator[tuple[str, torch.Tensor]], version: int, *, flush: bool
    ) -> Sent:
        """Give all ``weights`` to ``engines`` as ``version``; ``flush``: empty their prefix caches afterwards.

        One engine's failure is told in the result; what fails here raises RefreshError, with no engine touched.
        """

    def forget(self, engine: WeightClient) -> None:
        """This engine was started again, or was out: what it was told, or said, before is void."""
        self._ranks.pop(engine, None)

    async def close(self) -> None:  # noqa: B027 - most ways leave nothing
        """Leave nothing behind, at the engines or here."""

    async def _ask_ranks(self, engine: WeightClient) -> None:
        """Fill ``_ranks``; the question takes an engine longer than a bucket of 50 MB."""
        if engine not in self._ranks:
            self._ranks[engine] = await engine.tensor_parallel()


def buckets(weights: Iterable[tuple[str, torch.Tensor]], limit: int) -> Iterator[tuple[NamedTensors, bool]]:
    """Tensors, in order, in lists of at most ``limit`` bytes, a larger one alone; and whether the list is the last."""
    bucket: NamedTensors = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket, False
            bucket, size = [], 0
        bucket.append((name, tensor.detach()))
        size += tensor.nbytes
    if bucket:
        yield bucket, True


def described(bucket: NamedTensors) -> WeightBucket:
    """What an engine is told of it."""
    return WeightBucket(
        names=[name for name, _ in bucket],
        dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        shapes=[list(tensor.shape) for _, tensor in bucket],
    )


def joined(parts: Sequence[WeightBucket]) -> WeightBucket:
    """One description of what several describe."""
    names, dtypes, shapes = (
        [value for part in values for value in part]
        for values in zip(*((part.names, part.dtypes, part.shapes) for part in parts), strict=True)
    )
    return WeightBucket(names, dtypes, shapes)


async def each(
    engines: Iterable[WeightClient], call: Callable[[WeightClient], Awaitable[object]]
) -> dict[WeightClient, OpdError]:
    """Await ``call`` for all engines at once; those for which it failed, with the error."""
    engines = list(engines)
    results = await asyncio.gather(*map(call, engines), return_exceptions=True)
    failed = {}
    for engine, result in zip(engines, results, strict=True):
        if isinstance(result, OpdError):
            failed[engine] = result
        elif isinstance(result, BaseException):
            raise result
    return failed


async def soon(engine: WeightClient, answer: Awaitable[Answer]) -> Answer:
    """Await a quick ``answer`` of ``engine``. Raises TransientError when it does not come."""
    try:
        async with asyncio.timeout(ANSWER_S):
            return await answer
    except TimeoutError as error:
        raise TransientError("An engine does not answer", where=engine.url, got=f"for {ANSWER_S:g} s") from error
