"""The trainer ranks' side of the coordinator's HTTP interface."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from megatron_opd.records import PackedBatch
from megatron_opd.runtime.env import token
from megatron_opd.runtime.http import fetch, new_session, with_retries
from megatron_opd.runtime.messages import RefreshReport
from megatron_opd.runtime.wire import decode

ATTEMPTS = 6  # about half a minute: long enough for a hiccup, short enough for a dead coordinator
REQUEST_TIMEOUT_S = 120.0
SEND_AGAIN = 205  # the status instead of a batch


class CoordinatorClient:
    """One rank's connection."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._session = new_session(timeout_s=REQUEST_TIMEOUT_S, token=token())

    async def close(self) -> None:
        await self._session.close()

    async def batch(
        self, version: int, data_rank: int, send_again: Callable[[int], Awaitable[None]]
    ) -> PackedBatch | None:
        """Wait for the batch of a data-parallel rank, however long its rollouts take; None when the run is over.

        ``send_again(n)`` is awaited when the engines have lost the weights, for the n-th time since they are live; all
        ranks come to it alike. Raises EngineError.
        """
        resent = 0
        while True:
            url = f"{self._url}/v1/batch/{version}/{data_rank}?resent={resent}"
            status, body = await with_retries(ATTEMPTS, lambda url=url: fetch(self._session, "GET", url))
            if status == SEND_AGAIN:
                resent += 1
                await send_again(resent)
            if status == 200:
                return decode(body) if body else None

    async def refreshed(self, report: RefreshReport) -> None:
        """Tell that new weights are live. Raises EngineError."""
        url = f"{self._url}/v1/refreshed"
        await with_retries(ATTEMPTS, lambda: fetch(self._session, "POST", url, json=report.model_dump()))
