"""A proxy in front of a scoring server that spoils answers as it is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import aiohttp
from aiohttp import web


def _rows(change: Callable[[list], list]) -> Callable[[dict], None]:
    def spoil(meta: dict) -> None:
        meta["input_token_logprobs"] = change(meta["input_token_logprobs"])

    return spoil


def _value(value: float | None, at: int = 1) -> Callable[[dict], None]:
    return _rows(lambda rows: [[value, *row[1:]] if place == at else row for place, row in enumerate(rows)])


# What is done to the answer's account of itself, and the kind under which the drop must be counted.
SPOILT: dict[str, tuple[Callable[[dict], None], str]] = {
    "short": (_rows(lambda rows: rows[:-1]), "count"),
    "shifted": (_rows(lambda rows: [*rows[1:], rows[-1]]), "first_row"),
    "shifted values": (_rows(lambda rows: [[None, rows[0][1], None], *rows[:1], *rows[2:]]), "ids"),
    "duplicate row": (_rows(lambda rows: [*rows[:2], *rows[1:]]), "count"),
    "duplicate row in place of the last": (_rows(lambda rows: [*rows[:-1], rows[-2]]), "ids"),
    "NaN": (_value(float("nan")), "not_finite"),
    "null": (_value(None), "not_finite"),
    "positive": (_value(0.5), "positive"),
    "wrong ids": (_rows(lambda rows: [[row[0], row[1] + 1, None] for row in rows]), "ids"),
    "another weight version": (lambda meta: meta.update(weight_version="7"), "weights"),
    "wrong prompt length": (lambda meta: meta.update(prompt_tokens=meta["prompt_tokens"] - 1), "prompt_length"),
    "too many cached": (lambda meta: meta.update(cached_tokens=meta["prompt_tokens"]), "cached"),
    "aborted": (lambda meta: meta.update(finish_reason={"type": "abort"}), "finish"),
    "another request": (lambda meta: meta.update(id="0"), "other_request"),
    "a field less": (lambda meta: meta.pop("prompt_tokens"), "malformed"),
}
# What another try cures, and the kind when none does.
PASSING = {
    "truncated": "malformed",
    "500": "server_error",
    "503": "server_error",
    "reset": "no_answer",
    "cut": "no_answer",
    "hang": "timeout",
}


class FaultyProxy:
    """Spoils the next ``times`` answers of ``upstream`` by ``fault``; then every second one by the next of ``plan``."""

    def __init__(self, upstream: str) -> None:
        self.upstream, self.fault, self.times, self.seen = upstream, "", 0, 0
        self.plan: list[str] = []
        self._waiting: asyncio.Future | None = None

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_post("/{path:.*}", self._answer)
        app.router.add_get("/{path:.*}", self._get)
        return app

    async def _get(self, request: web.Request) -> web.Response:
        async with aiohttp.ClientSession() as session, session.get(self.upstream + request.path) as reply:
            return web.Response(status=reply.status, body=await reply.read(), content_type=reply.content_type)

    def _next_fault(self) -> str:
        self.seen += 1
        if self.times > 0:
            self.times -= 1
            return self.fault
        return self.plan.pop(0) if self.plan and self.seen % 2 else ""

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        fault, body = self._next_fault(), await request.read()
        json_type = {"Content-Type": "application/json"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.upstream + request.path, data=body, headers=json_type) as reply,
        ):
            good = await reply.read()
        if not fault:
            return web.Response(status=reply.status, body=good, content_type="application/json")
        if fault in SPOILT:
            answer = json.loads(good)
            SPOILT[fault][0](answer["meta_info"])
            return web.Response(text=json.dumps(answer), content_type="application/json")
        return await self._fail(fault, request, good)

    async def _fail(self, fault: str, request: web.Request, good: bytes) -> web.StreamResponse:
        match fault:
            case "swapped":
                return web.Response(body=await self._swap(good), content_type="application/json")
            case "oversized":
                return web.Response(body=b" " * (1 << 21) + good, content_type="application/json")
            case "truncated":
                return web.Response(body=good[: len(good) // 2], content_type="application/json")
            case "500" | "503":
                return web.Response(status=int(fault), text="busy")
            case "hang":
                await asyncio.sleep(3600)
            case "cut":
                response = web.StreamResponse(headers={"Content-Length": str(len(good))})
                await response.prepare(request)
                await response.write(good[:10])
        request.transport.abort()
        return web.Response()

    async def _swap(self, good: bytes) -> bytes:
        """The other one's answer of two requests that are under way together."""
        if self._waiting is None:
            self._waiting = asyncio.get_running_loop().create_future()
            mine, self._mine = self._waiting, good
            return await mine
        self._waiting.set_result(good)
        self._waiting = None
        return self._mine
