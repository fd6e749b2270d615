"""A server under the test's control, behind real HTTP, and a client of it."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from megatron_opd.engines.sglang import SGLangClient


class FakeServer:
    """Answers every POST with ``answer`` and ``status``, and remembers paths and bodies."""

    def __init__(self) -> None:
        self.answer: object = None
        self.text: str | None = None  # the answer when it is no JSON
        self.status = 200
        self.release = "0.5.21"
        self.posts: list[tuple[str, dict]] = []

    async def post(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.posts.append((request.path, body))
        if "rid" in body:  # as SGLang does, but these tests compare bodies
            self.answer = {"meta_info": {}} | self.answer
            self.answer["meta_info"]["id"] = body.pop("rid")
        if self.text is not None:
            return web.Response(text=self.text)
        return web.json_response(self.answer, status=self.status)

    async def info(self, _: web.Request) -> web.Response:
        return web.json_response({"version": self.release})


@pytest.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, SGLangClient]]:
    server, app = FakeServer(), web.Application()
    app.router.add_get("/server_info", server.info)
    app.router.add_post("/{path:.*}", server.post)
    async with TestServer(app) as running:
        client = SGLangClient(str(running.make_url("/")), timeout_s=5, max_concurrency=4)
        yield server, client
        await client.close()
