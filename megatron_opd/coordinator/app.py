"""The coordinator's HTTP side: trainer ranks fetch batches and report refreshes.

GET  /health                       200, no token needed
GET  /metrics                      Prometheus' text format (observe/prometheus.py), no token needed
GET  /v1/batch/{version}/{rank}    200 safetensors bytes, none when the run is over | 204 not there yet, ask again
POST /v1/refreshed                 a RefreshReport
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Awaitable, Callable

from aiohttp import web
from pydantic import ValidationError

from megatron_opd.observe.prometheus import CONTENT_TYPE, Exposition
from megatron_opd.runtime.messages import RefreshReport

LONG_POLL_S = 20.0
MAX_REPORT_BYTES = 1 << 20
OPEN_PATHS = ("/health", "/metrics")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class BatchBoard:
    """Where the loop leaves batches and waits for weights; where HTTP requests find and report them.

    ``first``: version of the weights that the trainer starts with.
    """

    def __init__(self, first: int = 0) -> None:
        self._changed = asyncio.Condition()
        self._bodies: dict[int, list[bytes]] = {}
        self._first, self._over = first, False
        self.reports: list[RefreshReport] = []  # one for each version, in order

    @property
    def expected(self) -> int:
        """Version of the next report."""
        return self._first + len(self.reports)

    async def publish(self, version: int, bodies: list[bytes]) -> None:
        """Offer the encoded batches of all data-parallel ranks; those of earlier versions are let go."""
        async with self._changed:
            self._bodies = {version: bodies}
            self._changed.notify_all()

    async def end(self) -> None:
        """There will be no further batch: whoever asks for one is told so."""
        async with self._changed:
            self._over = True
            self._changed.notify_all()

    async def batch(self, version: int, rank: int, wait_s: float) -> bytes | None:
        """The batch of a rank as soon as it is there, or None after ``wait_s``; empty when the run is over.

        Raises IndexError for no such rank.
        """
        try:
            async with self._changed:
                await asyncio.wait_for(self._changed.wait_for(lambda: version in self._bodies or self._over), wait_s)
                return self._bodies[version][rank] if version in self._bodies else b""
        except TimeoutError:
            return None

    async def refreshed(self, report: RefreshReport) -> bool:
        """Take a report; False when it is not the next version's."""
        async with self._changed:
            if report.version != self.expected:
                return False
            self.reports.append(report)
            self._changed.notify_all()
            return True

    async def live(self, version: int) -> RefreshReport:
        """Wait until the weights of ``version`` are in the rollout engine."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.expected > version)
            return self.reports[version - self._first]


def make_app(board: BatchBoard, token: str, exposition: Exposition) -> web.Application:
    """The application; every path but /health and /metrics needs ``token``; ``exposition`` knows the newest step."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "")
        if request.path not in OPEN_PATHS and not hmac.compare_digest(given, f"Bearer {token}"):
            return web.json_response({"error": "a bearer token is needed"}, status=401)
        return await handler(request)

    async def health(_: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def metrics(_: web.Request) -> web.Response:
        version = board.expected - 1 if board.reports else None
        page = exposition.text(refreshes=len(board.reports), version=version)
        return web.Response(body=page.encode(), headers={"Content-Type": CONTENT_TYPE})

    async def batch(request: web.Request) -> web.Response:
        version, rank = int(request.match_info["version"]), int(request.match_info["rank"])
        try:
            body = await board.batch(version, rank, LONG_POLL_S)
        except IndexError:
            return web.json_response({"error": f"no data-parallel rank {rank}"}, status=404)
        return web.Response(status=204) if body is None else web.Response(body=body)

    async def refreshed(request: web.Request) -> web.Response:
        try:
            report = RefreshReport.model_validate_json(await request.read())
        except ValidationError as error:
            return web.json_response({"error": str(error)}, status=400)
        if not await board.refreshed(report):
            return web.json_response({"error": f"version {report.version} instead of {board.expected}"}, status=409)
        return web.json_response({})

    app = web.Application(middlewares=[guard], client_max_size=MAX_REPORT_BYTES)
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_get(r"/v1/batch/{version:\d+}/{rank:\d+}", batch)
    app.router.add_post("/v1/refreshed", refreshed)
    return app
