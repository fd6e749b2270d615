"""The trainer's view of an engine: brackets by release, refusals, pauses, and the state of its memory."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from fake_engine import FakeEngine

from megatron_opd.engines.memory import MemoryOccupation
from megatron_opd.engines.sglang import SGLangClient
from megatron_opd.engines.weights import WeightBucket, WeightClient
from megatron_opd.errors import EngineError
from megatron_opd.runtime.http import TransientError

BEGIN, END = "/begin_weight_update", "/end_weight_update"


@pytest.fixture
async def engine(fake) -> AsyncIterator[tuple[object, WeightClient]]:
    """The fake server that answers what it is told to, and the trainer's client of it."""
    server, plain = fake
    client = WeightClient(plain.url, timeout_s=5, max_concurrency=4)
    yield server, client
    await client.close()


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable]:
    """Serves the weight endpoints of a release of SGLang."""
    async with AsyncExitStack() as stack:

        async def begin(**options: object) -> tuple[FakeEngine, WeightClient]:
            fake, app = FakeEngine(tmp_path, **options), web.Application()
            app.router.add_get("/{path:.*}", fake.get)
            app.router.add_post("/{path:.*}", fake.post)
            running = await stack.enter_async_context(TestServer(app))
            client = WeightClient(str(running.make_url("/")), timeout_s=5, max_concurrency=4)
            stack.push_async_callback(client.close)
            return fake, client

        yield begin


async def test_an_update_that_failed_is_an_error(engine) -> None:
    server, client = engine
    server.answer = {"success": False, "message": "partially updated"}
    with pytest.raises(EngineError, match="update_weights_from_distributed") as caught:
        await client.receive_bucket(WeightBucket(["a"], ["float32"], [[1]]), "g", flush=True, version=1)
    assert "partially updated" in str(caught.value)


async def test_only_the_last_bucket_names_the_version(engine) -> None:
    server, client = engine
    server.answer = {"success": True}
    for version in (None, 7):
        await client.receive_bucket(WeightBucket(["a"], ["float32"], [[1]]), "g", flush=False, version=version)
    assert [body.get("weight_version", "none") for _, body in server.posts] == ["none", "7"]


@pytest.mark.parametrize(
    ("release", "known", "asked"),
    [
        ("0.5.20", False, []),
        ("0.5.21", True, [BEGIN, END]),
        ("0.6.0.dev1+cpu", True, [BEGIN, END]),
        ("0.0.0.dev1+g1234", True, [BEGIN, END]),  # a build from source says nothing of its release
        ("0.0.0.dev1+g1234", False, [BEGIN]),
    ],
)
async def test_brackets_only_where_the_server_knows_them(serve, release: str, known: bool, asked: list[str]) -> None:
    fake, client = await serve(release="0.5.21" if known else "0.5.20")

    async def info() -> dict:
        return {"version": release}

    client.server_info = info
    await client.begin_weight_update()
    await client.end_weight_update()
    assert fake.calls == asked


async def test_an_update_that_was_left_open_is_ended_first(serve) -> None:
    fake, client = await serve()
    await client.begin_weight_update()
    await client.begin_weight_update()
    assert [path for path in fake.calls if path in (BEGIN, END)] == [BEGIN, BEGIN, END, BEGIN]
    assert fake.is_open


async def test_a_checksum_is_taken_where_there_is_one(serve) -> None:
    fake, client = await serve()
    assert await client.weights_checksum() is None
    fake.checksum = "abc"
    assert await client.weights_checksum() == "abc"


def asked_of_memory(fake: FakeEngine) -> list[str]:
    return [path.split("_")[0] for path in fake.calls if "memory" in path]


async def test_memory_is_never_taken_twice(serve) -> None:
    """A second resume would end the server."""
    fake, client = await serve(version="3")
    memory = MemoryOccupation(client)
    await memory.resume(["weights", "kv_cache"])
    assert asked_of_memory(fake) == []
    await memory.release(["weights", "kv_cache"])
    await memory.release(["kv_cache"])
    assert memory.released == fake.released == {"weights", "kv_cache"}
    await memory.resume(["weights"])
    assert fake.released == {"kv_cache"}
    await memory.resume(["weights", "kv_cache"])
    assert memory.released == fake.released == set() and not fake.died
    assert asked_of_memory(fake) == ["/release", "/resume", "/resume"]


async def test_memory_in_an_unknown_state_is_left_alone(serve) -> None:
    fake, client = await serve(version="3", fault="memory")
    memory = MemoryOccupation(client)
    with pytest.raises(EngineError, match="500"):
        await memory.release(["weights"])
    for call in (memory.release, memory.resume):
        with pytest.raises(EngineError, match="not known"):
            await call(["kv_cache"])
    assert asked_of_memory(fake) == ["/release"]


@pytest.mark.parametrize("fault", ["", "memory"])
async def test_an_engine_that_was_started_again_holds_its_memory(serve, fault: str) -> None:
    fake, client = await serve(version="3", fault=fault)
    memory = MemoryOccupation(client)
    with pytest.raises(EngineError) if fault else nullcontext():
        await memory.release(["weights"])
    fake.released, fake.version = set(), "default"
    await memory.resume(["weights"])
    assert memory.released == set() and not fake.died and asked_of_memory(fake) == ["/release"]
    fake.version = "4"
    await memory.release(["weights"])
    await memory.resume(["weights"])
    assert asked_of_memory(fake) == ["/release", "/release", "/resume"] and fake.released == set()


class Hasty(BaseHTTPRequestHandler):
    """Answers, and gives the connection up without a word soon afterwards, as uvicorn does after 5 s."""

    protocol_version = "HTTP/1.1"
    timeout = 0.1

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hasty() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hasty)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


async def test_no_update_meets_a_connection_that_the_server_has_given_up(hasty: str) -> None:
    """While the trainer's loop stood still, and could not hear of it."""

    async def post_twice(kind: type[SGLangClient]) -> None:
        client = kind(hasty, timeout_s=5, max_concurrency=4)
        try:
            await client._post("/begin_weight_update", {})
            time.sleep(0.5)
            await client._post("/end_weight_update", {})
        finally:
            await client.close()

    with pytest.raises(TransientError, match="did not answer"):
        await post_twice(SGLangClient)
    await post_twice(WeightClient)
