"""Weights by shared memory of one machine: the engine copies them out of a buffer that it maps.

What travels over HTTP is a list of handles, pickled by torch as SGLang's own serializer does it; SGLang, not this
package, reads it, and takes no other types than tensors. The buffer is in main memory whatever the trainer's device: a
handle of memory on a GPU means something else in a process that sees other GPUs.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Container, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from urllib.parse import urlsplit

import torch
import torch.multiprocessing

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.weights import WeightClient
from megatron_opd.errors import RefreshError
from megatron_opd.student.transports.base import DEPARTURE_S, NamedTensors, Place, Sent, Transport, buckets, each

THIS_MACHINE = {"127.0.0.1", "localhost", "::1"}
ALIGNMENT = 8  # bytes: a tensor's place in the buffer is a multiple of its items' size


class SharedMemory(Transport):
    """Two buffers: one is filled while the engines copy the other."""

    def __init__(self, config: RefreshConfig, place: Place) -> None:
        super().__init__(config, place)
        self._buffers = [torch.empty(0, dtype=torch.uint8)] * 2

    async def send(
        self, engines: Sequence[WeightClient], weights: Iterator[tuple[str, torch.Tensor]], version: int, *, flush: bool
    ) -> Sent:
        self._check_machine(engines)
        sent = Sent()

        async def begin(engine: WeightClient) -> None:
            await self._ask_ranks(engine)
            await engine.begin_weight_update()

        under_way = asyncio.create_task(each(engines, begin))
        try:
            await asyncio.wait([under_way], timeout=DEPARTURE_S)
            for number, (bucket, last) in enumerate(buckets(weights, self._config.bucket_bytes // 2)):
                shared = self._share(bucket, number % 2)

                async def take(engine: WeightClient, shared: NamedTensors = shared, last: bool = last) -> None:
                    payloads = [_handles(shared) for _ in range(self._ranks[engine])]  # each is good for one reader
                    await engine.take_tensors(payloads, flush=flush and last, version=version if last else None)

                sent.failed |= await under_way
                under_way = asyncio.create_task(each(_without(engines, sent.failed), take))
                await asyncio.wait([under_way], timeout=DEPARTURE_S)
                sent.bytes += sum(tensor.nbytes for _, tensor in bucket)
            sent.failed |= await under_way
        finally:
            under_way.cancel()  # does nothing where it has ended
        sent.failed |= await each(_without(engines, sent.failed), WeightClient.end_weight_update)
        return sent

    def _share(self, bucket: NamedTensors, number: int) -> NamedTensors:
        """Copies of the tensors in a buffer."""
        places, size = [], 0
        for _, tensor in bucket:
            places.append(size)
            size += tensor.nbytes + -tensor.nbytes % ALIGNMENT
        if size > len(self._buffers[number]):
            # Memory with a name: an open file handle, torch's other way, can only be fetched by a child process, and an
            # engine that tries ends.
            torch.multiprocessing.set_sharing_strategy("file_system")
            size = max(size, self._config.bucket_bytes // 2)
            self._buffers[number] = torch.empty(size, dtype=torch.uint8).share_memory_()
        shared = []
        for (name, tensor), place in zip(bucket, places, strict=True):
            copy = self._buffers[number][place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            shared.append((name, copy.copy_(tensor)))
        return shared

    @staticmethod
    def _check_machine(engines: Sequence[WeightClient]) -> None:
        for engine in engines:
            if urlsplit(engine.url).hostname not in THIS_MACHINE:
                raise RefreshError(
                    "Shared memory reaches engines of this machine only",
                    where="refresh.mode",
                    got=f"tensor, and the engine {engine.url}",
                    fix="set refresh.mode to broadcast or disk, or name the engine by 127.0.0.1",
                )


def _handles(tensors: NamedTensors) -> str:
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(tensors)
    return base64.b64encode(buffer.getvalue()).decode()


def _without(engines: Sequence[WeightClient], failed: Container[WeightClient]) -> list[WeightClient]:
    return [engine for engine in engines if engine not in failed]
