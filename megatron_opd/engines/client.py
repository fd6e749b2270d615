"""What the clients of all engines share: one session, deadlines by length, bodies of limited size, JSON only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import nullcontext

from aiohttp import BytesPayload

from megatron_opd.engines.images import ImageFolder
from megatron_opd.engines.request_json import request_json
from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import READY_S, fetch, new_session, parse_json, wait_until_ready

CONTROL_BYTES = 64 << 20  # longest answer of an endpoint whose answers do not grow with the request
SPARE_CONNECTIONS = 8  # for requests about the server itself, while all others are taken


class EngineClient:
    """One server. Not bound to a task: any number of requests may be under way.

    timeout_s, prompt_token_s, new_token_s: longest wait for an answer, and what each token of the request and each that
    may be sampled adds to it. The clock starts when a request is sent, not while it waits for one of the
    ``max_concurrency`` places. api_key: bearer token; it is only ever in the session's headers. images: of prompts;
    None: no prompt has any.
    """

    ready_path: str  # answers 200 when the server takes requests
    read_answer: Callable[[bytes], object] = staticmethod(json.loads)  # of answers about tokens

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float,
        max_concurrency: int,
        prompt_token_s: float = 0.0,
        new_token_s: float = 0.0,
        api_key: str | None = None,
        images: ImageFolder | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._images = images
        self._timeout_s, self._prompt_token_s, self._new_token_s = timeout_s, prompt_token_s, new_token_s
        self._session = new_session(
            timeout_s=timeout_s, max_connections=max_concurrency + SPARE_CONNECTIONS, token=api_key
        )
        self._places = asyncio.Semaphore(max_concurrency)  # of requests with tokens

    async def close(self) -> None:
        await self._session.close()

    async def check_ready(self) -> None:
        """Raise EngineError unless the server takes requests."""
        await fetch(self._session, "GET", self.url + self.ready_path, max_bytes=CONTROL_BYTES, timeout_s=READY_S)

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Raise EngineError unless the server takes requests within ``timeout_s``."""
        await wait_until_ready(self.url + self.ready_path, timeout_s, self._session)

    def deadline_s(self, prompt_tokens: int, new_tokens: int) -> float:
        """Longest wait for the answer to a request of that size."""
        return self._timeout_s + self._prompt_token_s * prompt_tokens + self._new_token_s * new_tokens

    async def _get(self, path: str) -> dict:
        _, body = await fetch(self._session, "GET", self.url + path, max_bytes=CONTROL_BYTES)
        return parse_json(body, self.url + path)

    async def _post(
        self, path: str, body: dict, *, prompt_tokens: int = 0, new_tokens: int = 0, max_bytes: int = CONTROL_BYTES
    ) -> dict:
        limit_s, url = self.deadline_s(prompt_tokens, new_tokens), self.url + path
        data = BytesPayload(request_json(body), content_type="application/json")
        async with self._places if prompt_tokens else nullcontext():
            _, answer = await fetch(self._session, "POST", url, data=data, max_bytes=max_bytes, timeout_s=limit_s)
        return parse_json(answer, url, self.read_answer)

    def _check(self, ok: bool, what: str, got: object, expected: object) -> None:
        if not ok:
            raise EngineError(f"The server's {what} is wrong", where=self.url, got=got, expected=expected)
