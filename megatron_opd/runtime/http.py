"""The one HTTP client: a pooled session, one retry policy, and errors that carry what the server said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from megatron_opd.errors import EngineError

Result = TypeVar("Result")

# An idle connection is given up before the servers give it up (uvicorn: 5 s), or a request would meet a closed one.
IDLE_S = 2.0


class TransientError(EngineError):
    """A failure that another try may cure: no connection, a timeout, or a 5xx answer."""


def new_session(*, timeout_s: float, max_connections: int = 256, token: str | None = None) -> aiohttp.ClientSession:
    """A session for one server. ``timeout_s`` bounds one request; a connection must stand within 10 s."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections, keepalive_timeout=IDLE_S),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=10),
        headers={"Authorization": f"Bearer {token}"} if token else None,
        trust_env=False,
    )


async def fetch(
    session: aiohttp.ClientSession, method: str, url: str, *, json: object = None, data: bytes | None = None
) -> tuple[int, bytes]:
    """One request: status and body. Raises TransientError or, for a 4xx answer, EngineError with the server's words."""
    try:
        async with session.request(method, url, json=json, data=data) as response:
            body = await response.read()
            status = response.status
    except (aiohttp.ClientError, TimeoutError) as error:
        raise TransientError("A server did not answer", where=url, got=f"{type(error).__name__}: {error}") from error
    if status >= 400:
        kind = TransientError if status >= 500 else EngineError
        said = body[:500].decode(errors="replace")
        raise kind("A server refused a request", where=url, got=f"{status} {said}", expected="200")
    return status, body


async def with_retries(attempts: int, call: Callable[[], Awaitable[Result]]) -> Result:
    """Await ``call()``, again after a TransientError, with growing pauses and jitter; the last error is raised."""
    async for attempt in AsyncRetrying(
        stop=stop_after_attempt(attempts),
        wait=wait_exponential_jitter(multiplier=0.25, max=10),
        retry=retry_if_exception_type(TransientError),
        reraise=True,
    ):
        with attempt:
            return await call()
    raise AssertionError("unreachable: the last attempt returns or raises")


async def wait_until_ready(url: str, timeout_s: float) -> None:
    """Poll ``url`` until it answers 200. Raises EngineError, with the last answer, after ``timeout_s``."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with new_session(timeout_s=5) as session:
        while True:
            try:
                await fetch(session, "GET", url)
                return
            except EngineError as error:
                if asyncio.get_running_loop().time() > deadline:
                    what = f"A server did not become ready in {timeout_s:g} s"
                    raise EngineError(what, where=url, got=error.got, expected="200") from error
            await asyncio.sleep(0.3)
