"""The coordinator's HTTP side: trainer ranks fetch batches and report refreshes.

GET  /health                       200, no token needed
GET  /metrics                      Prometheus' text format (observe/prometheus.py), no token needed
GET  /v1/batch/{version}/{rank}    200 safetensors bytes, none when the run is over | 204 not there yet, ask again
                                   205 send the engines these weights again, then ask again with ?resent= one more
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


class SendAgain:
    """What a rank gets instead of its batch: the engines have lost their weights and need them once more."""


class BatchBoard:
    """Where the loop leaves batches and waits for weights; where HTTP requests find and report them.

    Weights can be asked for again only while their batch is not offered. A rank is told of that before it gets the
    batch, whenever it asks: so all ranks send weights equally often between two steps, which they can only do together.

    ``first``: version of the weights that the trainer starts with.
    """

    def __init__(self, first: int = 0) -> None:
        self._changed = asyncio.Condition()
        self._bodies: dict[int, list[bytes]] = {}
        self._first, self._over = first, False
        self._asked_again = 0  # times that the newest weights were asked for again
        self._resent: RefreshReport | None = None  # the latest answer to that
        self._polling = 0  # requests that wait for a batch
        self._dismissed = 0  # ranks that know that the run is over
        self.reports: list[RefreshReport] = []  # one for each version, in order

    @property
    def expected(self) -> int:
        """Version of the next report."""
        return self._first + len(self.reports)

    @property
    def offered(self) -> int | None:
        """Version of the batch that is offered."""
        return next(iter(self._bodies), None)

    @property
    def moved(self) -> tuple[object, ...]:
        """Something else after every event."""
        return self.expected, self.offered, self._asked_again, self._resent and self._resent.resend, self._over

    def waits(self) -> list[str]:
        """Who waits for whom, a line each."""
        told = []
        if self._polling and not self._over:
            told.append(f"the student waits for batch {self.expected - 1}")
        if self._asked_again > (self._resent.resend if self._resent else 0):
            told.append(f"weights {self.expected - 1} are to be sent by the student once more")
        if not self._over and (not self.reports or self.offered == self.expected - 1):
            told.append(f"the coordinator waits for weights {self.expected} of the student")
        return told

    async def publish(self, version: int, bodies: list[bytes]) -> None:
        """Offer the encoded batches of all data-parallel ranks; those of earlier versions are let go."""
        async with self._changed:
            self._bodies = {version: bodies}
            self._changed.notify_all()

    async def end(self, ranks: int = 0) -> None:
        """There will be no further batch: whoever asks for one is told so. Waits until so many ranks have been."""
        async with self._changed:
            self._over = True
            self._changed.notify_all()
            await self._changed.wait_for(lambda: self._dismissed >= ranks)

    async def batch(self, version: int, rank: int, wait_s: float, resent: int = 0) -> bytes | type[SendAgain] | None:
        """The batch of a rank as soon as it is there, or None after ``wait_s``; empty when the run is over.

        ``resent``: how often the rank has sent these weights again. Raises IndexError for no such rank.
        """

        def again() -> bool:
            return version == self.expected - 1 and self._asked_again > resent

        self._polling += 1
        try:
            async with self._changed:
                known = self._changed.wait_for(lambda: again() or version in self._bodies or self._over)
                await asyncio.wait_for(known, wait_s)
                if again():
                    return SendAgain
                if version in self._bodies:
                    return self._bodies[version][rank]
                self._dismissed += 1
                self._changed.notify_all()
                return b""
        except TimeoutError:
            return None
        finally:
            self._polling -= 1

    async def send_again(self) -> RefreshReport | None:
        """Have the newest weights sent to the engines once more, and wait until they are live.

        None when there will be other weights soon: the newest ones are being trained.
        """
        async with self._changed:
            version = self.expected - 1
            if not self.reports or version in self._bodies or self._over:
                return None
            self._asked_again += 1
            wanted = self._asked_again
            self._changed.notify_all()
            await self._changed.wait_for(
                lambda: self.expected - 1 > version or (self._resent is not None and self._resent.resend >= wanted)
            )
            return self._resent if self.expected - 1 == version else None

    async def refreshed(self, report: RefreshReport) -> bool:
        """Take a report, or the same one once more; False when it is neither the next version's nor was asked for."""
        async with self._changed:
            newest = self.reports[-1] if self.reports else None
            if report in (newest, self._resent):
                return True
            if report.resend:
                if report.version != self.expected - 1 or report.resend > self._asked_again:
                    return False
                self._resent = report
            elif report.version != self.expected:
                return False
            else:
                self.reports.append(report)
                self._asked_again, self._resent = 0, None
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
            body = await board.batch(version, rank, LONG_POLL_S, int(request.query.get("resent", "0")))
        except IndexError:
            return web.json_response({"error": f"no data-parallel rank {rank}"}, status=404)
        except ValueError:
            return web.json_response({"error": "resent is no number"}, status=400)
        if body is SendAgain:
            return web.Response(status=205)
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
