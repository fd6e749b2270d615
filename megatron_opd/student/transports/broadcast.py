"""Weights by broadcast: one process group spans the trainer's first rank and all ranks of all engines.

A tensor goes out of the memory it is in and arrives in memory of its own, without a copy on either side on the way:
concatenating buckets costs more than sending many tensors. The next bucket is gathered from the trainer's ranks while
the present one is on its way.

Where all engines can take a stream (``engines/sglang_receiver.py``), one request asks for as much as
``STREAM_BUCKETS`` buckets, and tensors follow each other as they are gathered (``sending.Line``). What will come is
known from the update before.

The engines of a group share one fate: when one of them fails, the group is dead, and all others have to be sent
everything again, in a new one.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,  # private, but the engine uses it too: both ends must derive the same keys
    _world,
)

from megatron_opd.engines.weights import WeightBucket, WeightClient
from megatron_opd.errors import EngineError, OpdError, RefreshError
from megatron_opd.runtime.http import TransientError
from megatron_opd.student.transports.base import (
    DEPARTURE_S,
    Sent,
    Transport,
    buckets,
    described,
    each,
    joined,
    soon,
)
from megatron_opd.student.transports.sending import Broadcasts, Line

Parting = Callable[[Iterable[WeightClient]], Awaitable[None]]

PARTING_S = 10.0  # for an engine to notice that its group is dead
STREAM_BUCKETS = 16  # for which one request asks: it bounds what one answer takes
POLL_S = 0.001  # between two looks at what is on its way


@dataclass(frozen=True)
class _Group:
    name: str
    members: tuple[WeightClient, ...]
    store: dist.TCPStore
    group: dist.ProcessGroup
    streams: bool  # whether every member takes a stream


@dataclass(frozen=True)
class _Bucket:
    """What one request asks for, on its way."""

    requests: dict[asyncio.Task, WeightClient]
    tensors: Broadcasts | Line


class Broadcast(Transport):
    """One group, formed anew when its members change or have been restarted."""

    _group: _Group | None = None
    _stale = False  # whether some member no longer knows the group
    _dead: tuple[str, ...] = ()  # names of groups that broke: their members may still hold what is left of them
    _layout: tuple[WeightBucket, ...] = ()  # of a whole update, for streams; empty before the first

    async def send(
        self, engines: Sequence[WeightClient], weights: Iterator[tuple[str, torch.Tensor]], version: int, *, flush: bool
    ) -> Sent:
        sent = Sent()
        try:
            failed = await self._meet(engines) or await each(engines, WeightClient.begin_weight_update)
            if not failed:
                way = self._stream if self._group.streams and self._layout else self._send_buckets
                failed = await way(engines, weights, version, flush, sent)
            failed = failed or await each(engines, WeightClient.end_weight_update)
        except BaseException:
            self._drop()
            raise
        if failed:
            self._drop()
            with_others = EngineError("The weight group broke", got=", ".join(engine.url for engine in failed))
            sent.failed = {engine: failed.get(engine, with_others) for engine in engines}
        return sent

    def forget(self, engine: WeightClient) -> None:
        super().forget(engine)
        self._stale = self._stale or (self._group is not None and engine in self._group.members)

    async def close(self) -> None:
        """Let the engines forget the group: a server that the run was attached to goes on without it."""
        if self._group is not None:
            members = self._group.members
            self._drop()
            await self._clean_up(members)

    async def _clean_up(self, engines: Sequence[WeightClient]) -> None:
        for name in self._dead:
            # One that was started again, or came later, knows of no such group.
            await each(engines, lambda engine, name=name: soon(engine, engine.leave_weight_group(name)))
        self._dead = ()

    async def _send_buckets(
        self,
        engines: Sequence[WeightClient],
        weights: Iterator[tuple[str, torch.Tensor]],
        version: int,
        flush: bool,
        sent: Sent,
    ) -> dict[WeightClient, OpdError]:
        under_way, layout = None, []
        contiguous = ((name, tensor.contiguous()) for name, tensor in weights)
        for bucket, last in buckets(contiguous, self._config.bucket_bytes):
            if under_way is not None and (failed := await self._arrive(under_way)):
                return failed
            layout.append(described(bucket))
            tensors = Broadcasts(self._group.group)
            under_way = self._ask(engines, layout[-1], flush and last, version if last else None, tensors)
            for _, tensor in bucket:
                sent.bytes += tensors.send(tensor)
            if not last:
                await asyncio.wait(under_way.requests, timeout=DEPARTURE_S)
        self._layout = tuple(joined(layout[i : i + STREAM_BUCKETS]) for i in range(0, len(layout), STREAM_BUCKETS))
        return await self._arrive(under_way)

    async def _stream(
        self,
        engines: Sequence[WeightClient],
        weights: Iterator[tuple[str, torch.Tensor]],
        version: int,
        flush: bool,
        sent: Sent,
    ) -> dict[WeightClient, OpdError]:
        for part in self._layout:
            last = part is self._layout[-1]
            line = Line(self._group.group)
            under_way = self._ask(engines, part, flush and last, version if last else None, line)
            try:
                for tensor in _as_expected(weights, part):
                    sent.bytes += line.send(tensor)
                    if not await self._has_room(line, under_way.requests):
                        break
            except BaseException:
                line.drop()  # its thread would keep the connections open, and the engines waiting
                raise
            if failed := await self._arrive(under_way):
                return failed
        if (more := next(weights, None)) is not None:
            raise RefreshError("There are more weights than at the last refresh", got=more[0])
        return {}

    async def _has_room(self, line: Line, requests: Iterable[asyncio.Task]) -> bool:
        """Wait until no more than a bucket's bytes are on their way; False: an engine has answered before the end."""
        deadline = time.monotonic() + self._config.timeout_s
        await asyncio.sleep(0)  # for requests to leave
        while not line.broken and time.monotonic() < deadline:
            if any(request.done() for request in requests):
                return False
            if line.under_way <= self._config.bucket_bytes:
                return True
            await asyncio.wait(requests, timeout=POLL_S)
        return False

    def _ask(
        self,
        engines: Sequence[WeightClient],
        description: WeightBucket,
        flush: bool,
        version: int | None,
        tensors: Broadcasts | Line,
    ) -> _Bucket:
        """Let the engines wait for what is described."""
        name, streamed = self._group.name, isinstance(tensors, Line)
        requests = {
            asyncio.create_task(
                engine.receive_bucket(description, name, flush=flush, version=version, streamed=streamed)
            ): engine
            for engine in engines
        }
        return _Bucket(requests, tensors)

    async def _arrive(self, bucket: _Bucket) -> dict[WeightClient, OpdError]:
        """Wait for a bucket. Answers first: when an engine refuses, nobody will ever join the broadcast."""

        async def give_up(failed: Iterable[WeightClient]) -> None:
            bucket.tensors.drop()
            await self._break_up(failed)

        failed = await self._together(bucket.requests, give_up)
        if not failed:
            bucket.tensors.close()
        return failed

    async def _meet(self, engines: Sequence[WeightClient]) -> dict[WeightClient, OpdError]:
        """Form a group of just these engines, unless there is one; engines that did not join."""
        if self._group is not None and self._group.members == tuple(engines) and not self._stale:
            return {}
        self._drop()
        await self._clean_up(engines)
        if failed := await each(engines, self._ask_ranks):
            return failed
        world, offset = 1 + sum(self._ranks[engine] for engine in engines), 1
        backend = "nccl" if dist.get_backend() == "nccl" else "gloo"
        # A name of its own: an engine that outlives a killed run may still know that one's group.
        name = f"megatron_opd_{secrets.token_hex(4)}"
        host, port, timeout = self._place.host, self._place.port, timedelta(seconds=self._config.timeout_s)
        meeting = [dist.TCPStore(host, port, world, is_master=True, timeout=timeout, wait_for_workers=False)]
        joining = {}
        for engine in engines:
            request = engine.join_weight_group(host, port, offset, world, backend, name)
            joining[asyncio.create_task(request)] = engine
            offset += self._ranks[engine]
        opening = asyncio.create_task(asyncio.to_thread(_open_group, name, backend, host, port, world, timeout))

        async def close_store(_: Iterable[WeightClient]) -> None:
            meeting.clear()

        failed = await self._together(joining, close_store, opening)
        if not failed:
            streams = all(request.result() for request in joining)
            self._group = _Group(name, tuple(engines), meeting.pop(), opening.result(), streams)
        return failed

    async def _together(
        self, requests: dict[asyncio.Task, WeightClient], part: Parting, *own: asyncio.Task
    ) -> dict[WeightClient, OpdError]:
        """Wait until all is done. At the first failure, or after the deadline, ``part``, which is told the engines
        that failed, wakes whoever waits for others.

        Engines that failed, as they say themselves or by their silence.
        """
        everything = {*requests, *own}
        done, waiting = await asyncio.wait(
            everything, timeout=self._config.timeout_s, return_when=asyncio.FIRST_EXCEPTION
        )
        if not waiting and not any(task.exception() for task in done):
            return {}
        await part([requests[task] for task in done if task in requests and task.exception()])
        if waiting:
            _, waiting = await asyncio.wait(waiting, timeout=PARTING_S)
        failed = {}
        for task in everything - waiting:
            if (error := task.exception()) is not None and task in requests:
                failed[requests[task]] = error
        for task in waiting:
            task.cancel()
            if task in requests:
                where = requests[task].url
                failed[requests[task]] = TransientError("An engine does not take its weights", where=where)
        unexpected = [error for error in failed.values() if not isinstance(error, EngineError)]
        if unexpected or not failed:
            raise unexpected[0] if unexpected else RefreshError("The weight group broke", got=_first_error(own))
        return failed

    async def _break_up(self, failed: Iterable[WeightClient]) -> None:
        """Leave, and let engines that have failed leave: whoever waits for one of them gets an error."""
        name = self._group.name
        self._drop()
        await each(failed, lambda engine: soon(engine, engine.leave_weight_group(name)))

    def _drop(self) -> None:
        """Leave the group without a word."""
        if self._group is not None:
            left, self._group, self._stale = self._group, None, False
            self._dead += (left.name,)
            dist.destroy_process_group(left.group)
            last_references = [left]
            del left
            # gloo cannot give up what it is sending: its destructor waits, and must not keep this thread waiting.
            threading.Thread(target=last_references.clear, daemon=True).start()


def _open_group(name: str, backend: str, host: str, port: int, world: int, timeout: timedelta) -> dist.ProcessGroup:
    # Not torch's rendezvous(): under torchrun that one looks for the launcher's store. And a connection like that of
    # the engines, so that all of them, and this thread, stop waiting when the store is closed.
    store = dist.TCPStore(host, port, world, is_master=False, timeout=timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        world, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    _world.pg_group_ranks[group] = {rank: rank for rank in range(world)}  # destroy_process_group looks for it
    return group


def _as_expected(weights: Iterator[tuple[str, torch.Tensor]], part: WeightBucket) -> Iterator[torch.Tensor]:
    """The next tensors, which the engines wait for. Raises RefreshError when others come."""
    expected = list(zip(part.names, part.dtypes, part.shapes, strict=True))
    number = -1
    for number, (name, tensor) in enumerate(islice(weights, len(expected))):
        if (found := described([(name, tensor)])) != WeightBucket(*([value] for value in expected[number])):
            raise RefreshError("The weights are others than at the last refresh", got=found, expected=expected[number])
        yield tensor.detach().contiguous()
    if number + 1 < len(expected):
        raise RefreshError("The weights end early", got=f"{number + 1} tensors", expected=f"{len(expected)}, as before")


def _first_error(tasks: Iterable[asyncio.Task]) -> BaseException | None:
    return next((task.exception() for task in tasks if task.done() and not task.cancelled()), None)
