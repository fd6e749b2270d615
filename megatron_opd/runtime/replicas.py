"""Servers of one model that do the same: who gets the next request, and who is left out until it answers again.

    in rotation --failures in a row--> resting --pause, then a probe that answers--> in rotation
    any state   --take_out-----------> taken out --put_back------------------------> in rotation

A request goes to the replica with the fewest tokens under way; requests with the same key (the samples of one group)
stay at the same replica, whose prefix cache holds their prompt, for as long as it is in rotation. The pause doubles
with each probe that fails; one failure after a return is enough for the next rest, until a request has succeeded.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from megatron_opd.config import RoutingConfig
from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import BadReply, TransientError, with_retries

logger = logging.getLogger(__name__)

REMEMBERED_KEYS = 65536  # groups whose replica is remembered; a step has fewer, and a forgotten one costs a cache miss


class HasUrl(Protocol):
    """A client of one server."""

    url: str


Client = TypeVar("Client", bound=HasUrl)
Result = TypeVar("Result")


@dataclass(eq=False)
class Replica(Generic[Client]):
    """One server as the pool sees it."""

    client: Client
    tokens: int = 0  # of the requests under way
    requests: int = 0  # under way
    served: int = 0  # requests so far; decides between replicas that are equally busy
    failures: int = 0  # in a row; a probe that answers does not end the row, only a request does
    pause_s: float = 0.0  # before the next probe; 0 since a request has succeeded
    resting: bool = False
    taken_out: str | None = None  # why somebody took it out; None while nobody has
    last_error: EngineError | None = None
    revival: asyncio.Task | None = field(default=None, repr=False)

    @property
    def in_rotation(self) -> bool:
        return not self.resting and self.taken_out is None

    def describe(self) -> str:
        """Its state in a line."""
        if self.taken_out is not None:
            return f"{self.client.url}: taken out: {self.taken_out}"
        if self.resting:
            error = self.last_error
            return f"{self.client.url}: {self.failures} failures in a row, the last: {error.what} ({error.got})"
        return f"{self.client.url}: in rotation, {self.tokens} tokens under way"


class AllReplicasOut(EngineError):
    """Every replica has been out for as long as a request may wait."""


class ReplicaPool(Generic[Client]):
    """The replicas of ``role``, at least one. ``probe`` raises EngineError unless a resting one may come back."""

    def __init__(
        self,
        role: str,
        clients: Sequence[Client],
        probe: Callable[[Client], Awaitable[None]],
        config: RoutingConfig,
    ) -> None:
        self.role = role
        self.replicas = [Replica(client) for client in clients]
        self._probe = probe
        self._config = config
        self._homes: OrderedDict[Hashable, Replica[Client]] = OrderedDict()
        self._changed = asyncio.Event()  # set, and replaced, when a replica comes back
        self.answered = 0  # requests so far
        self._waiting = 0  # requests that no replica can take

    @property
    def clients(self) -> list[Client]:
        """Of all replicas, in rotation or not."""
        return [replica.client for replica in self.replicas]

    @property
    def any_in_rotation(self) -> bool:
        return any(replica.in_rotation for replica in self.replicas)

    @property
    def where(self) -> str:
        """The URLs, for error messages."""
        return ", ".join(client.url for client in self.clients)

    async def close(self) -> None:
        """Stop probing."""
        revivals = [replica.revival for replica in self.replicas if replica.revival is not None]
        for task in revivals:
            task.cancel()
        await asyncio.gather(*revivals, return_exceptions=True)

    async def call(
        self, key: Hashable, tokens: int, attempts: int, work: Callable[[Client], Awaitable[Result]]
    ) -> Result:
        """``work`` with one replica; after a TransientError again, with another one where there is one.

        ``tokens``: size of the request. Raises what the last try raised, or AllReplicasOut. A try after which the
        replica rests says more about the replica than about the request: of such there may be ``attempts`` as well.
        """
        failed: set[Replica[Client]] = set()
        outages = 0

        async def attempt() -> Result:
            nonlocal outages
            replica = await self._wait_for_one(key, failed)
            replica.tokens += tokens
            replica.requests += 1
            replica.served += 1
            try:
                result = await work(replica.client)
            except (TransientError, BadReply) as error:
                failed.add(replica)
                self._note_failure(replica, error)
                outages += not replica.in_rotation
                raise
            finally:
                replica.tokens -= tokens
                replica.requests -= 1
            replica.failures, replica.pause_s = 0, 0.0
            self.answered += 1
            return result

        return await with_retries(lambda tried: outages >= attempts or tried - outages >= attempts, attempt)

    def waits(self) -> list[str]:
        """Who is asked by how many requests that have no answer yet, a line each."""
        told = [
            f"{replica.requests} requests wait for {self.role} {replica.client.url}"
            for replica in self.replicas
            if replica.requests
        ]
        if self._waiting:
            states = "; ".join(replica.describe() for replica in self.replicas)
            told.append(f"{self._waiting} requests wait until a server of {self.role} is in rotation: {states}")
        return told

    # ---------------------------------------------------------------- choosing

    async def _wait_for_one(self, key: Hashable, failed: set[Replica[Client]]) -> Replica[Client]:
        self._waiting += 1
        try:
            async with asyncio.timeout(self._config.wait_s):
                while (replica := self.choose(key, failed)) is None:
                    await self._changed.wait()
                return replica
        except TimeoutError:
            raise AllReplicasOut(
                f"No server of {self.role} has answered for {self._config.wait_s:g} s",
                kind="all_out",
                where=self.role,
                got="".join(f"\n    {replica.describe()}" for replica in self.replicas),
                fix="look at the logs of these servers; engine.routing.wait_s is how long a request waits",
            ) from None
        finally:
            self._waiting -= 1

    def choose(self, key: Hashable, failed: set[Replica[Client]] = frozenset()) -> Replica[Client] | None:
        """The replica for a request with ``key``, none of ``failed`` where that is possible; None when all are out."""
        ready = [replica for replica in self.replicas if replica.in_rotation]
        candidates = [replica for replica in ready if replica not in failed] or ready
        if not candidates:
            return None
        home = self._homes.get(key)
        chosen = home if home in candidates else min(candidates, key=lambda replica: (replica.tokens, replica.served))
        self._homes[key] = chosen
        self._homes.move_to_end(key)
        if len(self._homes) > REMEMBERED_KEYS:
            self._homes.popitem(last=False)
        return chosen

    # ------------------------------------------------------------- in and out

    def take_out(self, client: Client, why: str) -> None:
        """No further requests for this server; those under way go on."""
        self._replica_of(client).taken_out = why

    def put_back(self, client: Client) -> None:
        """Undo ``take_out``; a server that failed before is probed first."""
        self._replica_of(client).taken_out = None
        self._tell()

    def follow(self, out: Mapping[str, str]) -> None:
        """Take out the servers at the URLs of ``out``, with why; all others are proven well, and serve at once."""
        for replica in self.replicas:
            if replica.client.url in out:
                self.take_out(replica.client, out[replica.client.url])
            else:
                if replica.revival is not None:
                    replica.revival.cancel()
                replica.resting, replica.failures, replica.pause_s = False, 0, 0.0
                self.put_back(replica.client)

    def _replica_of(self, client: Client) -> Replica[Client]:
        return next(replica for replica in self.replicas if replica.client is client)

    def _note_failure(self, replica: Replica[Client], error: EngineError) -> None:
        replica.failures += 1
        replica.last_error = error
        if not replica.resting and replica.failures >= self._config.failures:
            replica.resting = True
            logger.warning("%s: %s rests: %s", self.role, replica.client.url, error.what)
            replica.revival = asyncio.create_task(self._revive(replica))

    async def _revive(self, replica: Replica[Client]) -> None:
        """Probe after growing pauses until the server answers; then it is in rotation again."""
        while replica.resting:
            replica.pause_s = min(max(2 * replica.pause_s, self._config.first_pause_s), self._config.longest_pause_s)
            await asyncio.sleep(replica.pause_s * random.uniform(0.8, 1.2))
            with suppress(EngineError):  # it rests on; its last request's error says more than the probe's
                await self._probe(replica.client)
                replica.resting = False
        logger.warning("%s: %s is back", self.role, replica.client.url)
        self._tell()

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
