"""Weight refresh, trainer side: the student's weights reach the rollout engine by broadcast, and are proven there.

Rank 0 of the trainer and the engine's ranks form a process group of their own. The weights are gathered tensor by
tensor under their Hugging Face names, so no rank ever holds a second model, and leave in buckets. Afterwards the
engine's log-probs of a fixed probe sequence must equal the trainer's: a wrong name map, a lost tensor or a stale cache
stops the run here and not in the learning curve.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    Backend,
    PrefixStore,
    _new_process_group_helper,  # private, but the engine uses it too: both ends must derive the same keys
)

from megatron_opd.config import RefreshConfig
from megatron_opd.engines.sglang import SGLangClient, WeightBucket
from megatron_opd.engines.token_rows import split_rows
from megatron_opd.errors import RefreshError
from megatron_opd.student.build import Student
from megatron_opd.student.export import hf_weights
from megatron_opd.student.step import sequence_logprobs

PROBE_TOKENS = 64


@dataclass(frozen=True)
class Refreshed:
    """How one refresh went; the same type on every rank, filled on rank 0."""

    seconds: float = 0.0
    bytes: int = 0
    probe_difference: float = 0.0


class WeightRefresh:
    """The way from one student to one rollout engine. Made by ``connect``; every rank calls ``push``."""

    def __init__(
        self, config: RefreshConfig, vocab_size: int, client: SGLangClient | None, group: dist.ProcessGroup | None
    ) -> None:
        self._config = config
        self._client, self._group = client, group  # both None on other ranks than 0
        # A fixed sequence of ordinary ids: what it says does not matter, only that both ends agree on it.
        self._probe = np.random.default_rng(0).integers(0, vocab_size, PROBE_TOKENS)

    @classmethod
    async def connect(
        cls, config: RefreshConfig, client: SGLangClient | None, host: str, port: int, vocab_size: int
    ) -> WeightRefresh:
        """Form the group with the engine behind ``client``, which only rank 0 passes. Raises EngineError."""
        if client is None:
            return cls(config, vocab_size, None, None)
        world = 1 + (await client.server_info())["tp_size"]
        backend = "nccl" if dist.get_backend() == "nccl" else "gloo"
        # A name of its own: an engine that outlives a killed run may still know that one's group.
        name = f"megatron_opd_{secrets.token_hex(4)}"
        _, group = await asyncio.gather(
            client.join_weight_group(host, port, world, backend, name),
            asyncio.to_thread(_open_group, name, backend, host, port, world, config.timeout_s),
        )
        return cls(config, vocab_size, client, group)

    async def close(self) -> None:
        """Let the engine forget the group: a server that the run was attached to goes on without it."""
        if self._client is not None:
            await self._client.leave_weight_group(self._group.group_name)

    async def push(self, student: Student, version: int) -> Refreshed:
        """Send all weights as ``version`` and compare the probe. Every rank calls it.

        Raises RefreshError when the engine's version or log-probs are not the trainer's, EngineError when it refuses.
        """
        began = time.monotonic()
        weights = hf_weights(student)
        if self._client is None:
            for _ in weights:  # takes part in the gathering, keeps nothing
                pass
            sequence_logprobs(student, self._probe)
            return Refreshed()
        async with asyncio.timeout(self._config.timeout_s):
            await self._client.begin_weight_update()
            sent = await self._send(weights, version)
            await self._client.end_weight_update()
        seconds = time.monotonic() - began
        await self._check_version(version)
        return Refreshed(seconds, sent, await self._check_probe(student, version))

    async def _send(self, weights: Iterator[tuple[str, torch.Tensor]], version: int) -> int:
        """Broadcast bucket after bucket; the last one flushes the engine's prefix cache. Returns the bytes."""
        sent, bucket = 0, next(buckets := _buckets(weights, self._config.bucket_mb << 20))
        while bucket is not None:
            following = next(buckets, None)
            sent += await self._broadcast(bucket, version, last=following is None)
            bucket = following
        return sent

    async def _broadcast(self, bucket: list[tuple[str, torch.Tensor]], version: int, *, last: bool) -> int:
        names, tensors = zip(*bucket, strict=True)
        description = WeightBucket(
            names=list(names),
            dtypes=[str(tensor.dtype).removeprefix("torch.") for tensor in tensors],
            shapes=[list(tensor.shape) for tensor in tensors],
        )
        payload = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
        request = asyncio.create_task(
            self._client.receive_bucket(description, self._group.group_name, flush=last, version=version)
        )
        work = self._group.broadcast([payload], _from_rank_0())
        await request  # first: when the engine refuses, nobody will ever join the broadcast
        work.wait()
        return payload.nbytes

    async def _check_version(self, version: int) -> None:
        live = await self._client.weight_version()
        if live != str(version):
            raise RefreshError(
                "The rollout engine did not take the new weight version",
                where=self._client.url,
                got=live,
                expected=version,
            )

    async def _check_probe(self, student: Student, version: int) -> float:
        ours = sequence_logprobs(student, self._probe)
        reply = await self._client.prompt_logprobs(self._probe.tolist(), start=0)
        theirs = split_rows(reply["meta_info"]["input_token_logprobs"])[0][1:]
        difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("nan")
        if not difference <= self._config.probe_tolerance:  # also true for NaN
            raise RefreshError(
                "After a weight refresh the rollout engine's log-probs are not the trainer's",
                where=f"{self._client.url}, weight version {version}, probe of {PROBE_TOKENS} tokens",
                got=f"largest difference {difference:.3g}",
                expected=f"at most {self._config.probe_tolerance:g}",
                fix="compare the precision of student and engine (student.dtype, engine.dtype), then the name map",
            )
        return difference


def _buckets(weights: Iterator[tuple[str, torch.Tensor]], limit: int) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Group tensors, in order, into lists of at most ``limit`` bytes; a larger tensor goes alone."""
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def _open_group(name: str, backend: str, host: str, port: int, world: int, timeout_s: float) -> dist.ProcessGroup:
    timeout = timedelta(seconds=timeout_s)
    # Not torch's rendezvous(): under torchrun that one looks for the launcher's store instead of opening this one.
    store = dist.TCPStore(host, port, world, is_master=True, timeout=timeout, wait_for_workers=False)
    group, _ = _new_process_group_helper(
        world, 0, [], Backend(backend), PrefixStore(name, store), group_name=name, timeout=timeout
    )
    return group


def _from_rank_0() -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return options
