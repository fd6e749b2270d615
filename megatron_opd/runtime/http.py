"""The one HTTP client: a pooled session, one retry policy, and errors that carry what the server said."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import TypeVar

import aiohttp
from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from megatron_opd.errors import EngineError

Result = TypeVar("Result")

# An idle connection is given up before the servers give it up (uvicorn: 5 s), or a request would meet a closed one.
IDLE_S = 2.0
CONNECT_S = 10.0
READY_S = 5.0  # longest wait for an answer about readiness
READY_BYTES = 1 << 20  # longest such answer
READ_BYTES = 1 << 20  # of an answer that are kept unread: with aiohttp's 64 KB it stops the socket for every piece
TRANSIENT_STATUS = {408, 425, 429, *range(500, 600)}


class TransientError(EngineError):
    """A failure that another try may cure: no connection, a timeout, a 5xx answer, or no JSON."""


class BadReply(EngineError):
    """An answer that cannot be true, or cannot be read: it is not used, and says something about the server."""


def new_session(
    *, timeout_s: float, max_connections: int = 256, token: str | None = None, reuse: bool = True
) -> aiohttp.ClientSession:
    """A session for one server. ``timeout_s`` bounds one request; a connection must stand within 10 s.

    ``reuse``: whether a connection serves several requests. One that the server has given up meanwhile fails, and
    nobody knows whether the request was done; a process whose loop stands still for seconds can meet such a one.
    """
    keep = {"keepalive_timeout": IDLE_S} if reuse else {"force_close": True}
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=max_connections, **keep),
        timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
        headers={"Authorization": f"Bearer {token}"} if token else None,
        trust_env=False,
        read_bufsize=READ_BYTES,
    )


async def fetch(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    json: object = None,
    data: bytes | aiohttp.Payload | None = None,
    max_bytes: int | None = None,
    timeout_s: float | None = None,
) -> tuple[int, bytes]:
    """One request: status and body. ``timeout_s`` takes the place of the session's.

    Raises TransientError; for a 4xx answer EngineError with the server's words; BadReply as soon as an answer is longer
    than ``max_bytes``, of which no more is read.
    """
    timeout = session.timeout if timeout_s is None else aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S)
    try:
        async with session.request(method, url, json=json, data=data, timeout=timeout) as response:
            body, status = await _read(response, url, max_bytes), response.status
    except TimeoutError as error:
        got = f"{type(error).__name__}: {error}"
        raise TransientError("A server did not answer in time", kind="timeout", where=url, got=got) from error
    except aiohttp.ClientError as error:
        got = f"{type(error).__name__}: {error}"
        raise TransientError("A server did not answer", kind="no_answer", where=url, got=got) from error
    if status >= 400:
        kind, name = (TransientError, "server_error") if status in TRANSIENT_STATUS else (EngineError, "refused")
        name = "denied" if status in (401, 403) else name
        said = body[:500].decode(errors="replace")
        raise kind("A server refused a request", kind=name, where=url, got=f"{status} {said}", expected="200")
    return status, body


async def _read(response: aiohttp.ClientResponse, url: str, max_bytes: int | None) -> bytes:
    if max_bytes is None:
        return await response.read()
    parts, size = [], 0
    async for part in response.content.iter_any():
        parts.append(part)
        size += len(part)
        if size > max_bytes:
            raise BadReply(
                "A server's answer is longer than it can be", kind="too_large", where=url, expected=f"{max_bytes} bytes"
            )
    return b"".join(parts)


def parse_json(body: bytes, url: str, read: Callable[[bytes], object] = json.loads) -> object:
    """The answer as JSON, the only format that is taken from another server. Raises TransientError.

    read: another reader of the same format, for answers with many numbers.
    """
    try:
        return read(body)
    except (ValueError, RecursionError) as error:
        said = body[:200].decode(errors="replace")
        raise TransientError("A server's answer is no JSON", kind="malformed", where=url, got=said) from error


async def with_retries(attempts: int | Callable[[int], bool], call: Callable[[], Awaitable[Result]]) -> Result:
    """Await ``call()``, again after a TransientError, with growing pauses and jitter; the last error is raised.

    attempts: how often, or whether so many failed tries are enough.
    """
    enough = attempts if callable(attempts) else lambda tried: tried >= attempts
    async for attempt in AsyncRetrying(
        stop=lambda state: enough(state.attempt_number),
        wait=wait_exponential_jitter(multiplier=0.25, max=10),
        retry=retry_if_exception_type(TransientError),
        reraise=True,
    ):
        with attempt:
            return await call()
    raise AssertionError("unreachable: the last attempt returns or raises")


async def wait_until_ready(url: str, timeout_s: float, session: aiohttp.ClientSession | None = None) -> None:
    """Poll ``url``, in a session of its own or in ``session``, until it answers 200.

    Raises EngineError, with the last answer, after ``timeout_s``, and at once when the server denies access.
    """
    deadline = asyncio.get_running_loop().time() + timeout_s
    async with AsyncExitStack() as stack:
        session = session or await stack.enter_async_context(new_session(timeout_s=READY_S))
        while True:
            try:
                await fetch(session, "GET", url, max_bytes=READY_BYTES, timeout_s=READY_S)
                return
            except EngineError as error:
                if error.kind == "denied":
                    raise
                if asyncio.get_running_loop().time() > deadline:
                    what = f"A server did not become ready in {timeout_s:g} s"
                    raise EngineError(what, where=url, got=error.got, expected="200") from error
            await asyncio.sleep(0.3)
