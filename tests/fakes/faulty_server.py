"""A proxy in front of a real SGLang (or of a fake that speaks like it) that spoils scoring replies in one of many ways.

    async with FaultyServer(upstream_url, "shifted").running() as url: ...
    python tests/fakes/faulty_server.py UPSTREAM_URL KIND [--times N] [--after N] [--port P] [--other URL]

Only replies of ``POST /generate`` are spoilt; all else goes through as it is. ``after`` lets a handshake pass.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
from aiohttp import web

Rows = list[list]


@dataclass(frozen=True)
class Fault:
    """One way to spoil a reply, and what the client must call it."""

    what: str  # for a table
    kind: str  # of the drop, if nothing cures it
    spoil: Callable[[dict], None] | None = None  # of the reply; None: see the method of FaultyServer
    transient: bool = False  # another try, or another replica, gives the right number


def _rows(change: Callable[[Rows], Rows]) -> Callable[[dict], None]:
    def spoil(reply: dict) -> None:
        meta = reply["meta_info"]
        meta["input_token_logprobs"] = change(meta["input_token_logprobs"])

    return spoil


def _last_value(value: float) -> Callable[[dict], None]:
    return _rows(lambda rows: [*rows[:-1], [value, *rows[-1][1:]]])


def _null_inside(rows: Rows) -> Rows:
    place = max(1, len(rows) // 2)
    return [*rows[:place], [None, *rows[place][1:]], *rows[place + 1 :]]


def _other_ids(rows: Rows) -> Rows:
    return [[value, 1 if token != 1 else 3, text] for value, token, text in rows]


def _aborted(reply: dict) -> None:
    reply["meta_info"]["finish_reason"] = {"type": "abort"}


def _longer(reply: dict) -> None:
    reply["meta_info"]["prompt_tokens"] += 1


def _all_cached(reply: dict) -> None:
    reply["meta_info"]["cached_tokens"] = reply["meta_info"]["prompt_tokens"]


def _other_weights(reply: dict) -> None:
    reply["meta_info"]["weight_version"] = "another"


def _fewer_fields(reply: dict) -> None:
    del reply["meta_info"]["prompt_tokens"]


def _huge(reply: dict) -> None:
    reply["text"] = "x" * (4 << 20)


FAULTS = {
    "short": Fault("the last row is missing", "count", _rows(lambda rows: rows[:-1])),
    "duplicated_row": Fault("one row comes twice", "count", _rows(lambda rows: [*rows[:2], *rows[1:]])),
    "shifted": Fault("rows moved by one", "first_row", _rows(lambda rows: [*rows[1:], rows[0]])),
    "shifted_rows": Fault(
        "rows moved by one, the first kept", "ids", _rows(lambda rows: [rows[0], rows[-1], *rows[1:-1]])
    ),
    "wrong_ids": Fault("ids of another text", "ids", _rows(_other_ids)),
    "nan": Fault("NaN for a log-prob", "not_finite", _last_value(float("nan"))),
    "minus_infinity": Fault("minus infinity for a log-prob", "not_finite", _last_value(float("-inf"))),
    "sentinel": Fault("-9999 for a log-prob", "not_finite", _last_value(-9999.0)),
    "null_inside": Fault("null for a log-prob in the middle", "not_finite", _rows(_null_inside)),
    "positive": Fault("a log-prob above 0", "positive", _last_value(0.5)),
    "prompt_length": Fault("counted a token too many", "prompt_length", _longer),
    "cached": Fault("says that all came from the cache", "cached", _all_cached),
    "aborted": Fault("the request was aborted", "finish", _aborted),
    "other_weights": Fault("weights of another version", "weights", _other_weights),
    "other_model": Fault("another model's server answers", "weights"),
    "swapped": Fault("two requests get each other's reply", "other_request"),
    "oversized": Fault("4 MiB more than an honest reply", "too_large", _huge),
    "field_missing": Fault("a field is missing", "malformed", _fewer_fields),
    "truncated_json": Fault("half of the JSON", "malformed", transient=True),
    "cut": Fault("the connection closes in the middle of the body", "no_answer", transient=True),
    "reset": Fault("the connection is reset before an answer", "no_answer", transient=True),
    "error_500": Fault("status 500", "server_error", transient=True),
    "error_503": Fault("status 503", "server_error", transient=True),
    "hang": Fault("no answer", "timeout", transient=True),
}


class FaultyServer:
    """``kind``: a key of FAULTS, None: only ``plan``. ``after``: replies that pass first; ``times``: replies that are
    spoilt, None: all.

    ``other_url``: of ``other_model``, the server that answers. ``active`` may be switched while it runs, and ``plan``
    filled: kinds that spoil every second reply, one each, and ``kind`` none meanwhile.
    """

    def __init__(
        self,
        upstream_url: str,
        kind: str | None = None,
        *,
        times: int | None = None,
        after: int = 0,
        other_url: str | None = None,
    ) -> None:
        self.upstream_url, self.kind = upstream_url.rstrip("/"), kind
        self.times, self.after, self.other_url = times, after, other_url
        self.active = True
        self.plan: list[str] = []
        self.spoilt = 0  # replies so far
        self._passed = False  # whether the last reply under ``plan`` was not spoilt
        self._waiting: asyncio.Future | None = None  # ``swapped``: gets the second reply of a pair
        self._first: tuple[int, bytes] | None = None  # ``swapped``: the first one
        self._closing = asyncio.Event()

    def spoil_next(self, kind: str, times: int) -> None:
        """Spoil so many of the next replies, and none after them."""
        self.kind, self.times = kind, self.spoilt + times

    @asynccontextmanager
    async def running(self, port: int = 0) -> AsyncIterator[str]:
        """The proxy's URL."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as self._session:
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", port).start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
            finally:
                self._closing.set()
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        kind = self._due() if request.path == "/generate" else None
        if kind is None:
            return self._response(*await self._forward(request, self.upstream_url))
        self.spoilt += 1
        spoil = FAULTS[kind].spoil
        if spoil is None:
            return await getattr(self, f"_{kind}")(request)
        status, body = await self._forward(request, self.upstream_url)
        reply = json.loads(body)
        spoil(reply)
        compact = json.dumps(reply, separators=(",", ":"))  # as SGLang writes it
        return self._response(status, compact.encode())

    def _due(self) -> str | None:
        """What spoils the next reply."""
        if not self.active:
            return None
        if self.plan:
            self._passed = not self._passed
            return None if self._passed else self.plan.pop(0)
        if self.after > 0:
            self.after -= 1
            return None
        return self.kind if self.times is None or self.spoilt < self.times else None

    async def _forward(self, request: web.Request, url: str) -> tuple[int, bytes]:
        body, headers = await request.read(), {"Content-Type": "application/json"}
        async with self._session.request(request.method, url + request.path, data=body, headers=headers) as answer:
            return answer.status, await answer.read()

    def _response(self, status: int, body: bytes) -> web.Response:
        return web.Response(status=status, body=body, content_type="application/json")

    # ----------------------------------------------------------------- faults that are not of one reply's JSON

    async def _other_model(self, request: web.Request) -> web.Response:
        return self._response(*await self._forward(request, self.other_url))

    async def _swapped(self, request: web.Request) -> web.Response:
        own = await self._forward(request, self.upstream_url)
        if self._waiting is None:
            self._first, self._waiting = own, asyncio.get_running_loop().create_future()
            return self._response(*await self._waiting)
        self._waiting.set_result(own)
        self._waiting = None
        return self._response(*self._first)

    async def _truncated_json(self, request: web.Request) -> web.Response:
        status, body = await self._forward(request, self.upstream_url)
        return self._response(status, body[: len(body) // 2])

    async def _cut(self, request: web.Request) -> web.StreamResponse:
        _, body = await self._forward(request, self.upstream_url)
        response = web.StreamResponse(headers={"Content-Length": str(len(body))})
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
        request.transport.close()
        return response

    async def _reset(self, request: web.Request) -> web.Response:
        request.transport.abort()
        return web.Response()

    async def _error_500(self, _: web.Request) -> web.Response:
        return web.Response(status=500, text="Internal Server Error")

    async def _error_503(self, _: web.Request) -> web.Response:
        return web.Response(status=503, text="Service Unavailable")

    async def _hang(self, _: web.Request) -> web.Response:
        await self._closing.wait()
        return web.Response(status=503)


async def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upstream_url")
    parser.add_argument("kind", choices=FAULTS)
    parser.add_argument("--times", type=int)
    parser.add_argument("--after", type=int, default=0)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--other")
    given = parser.parse_args()
    server = FaultyServer(given.upstream_url, given.kind, times=given.times, after=given.after, other_url=given.other)
    async with server.running(given.port) as url:
        print(url, flush=True)  # noqa: T201
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
