"""The judge against a server that speaks the protocol and says what the test wants."""

import asyncio
import json
import threading

import pytest
from aiohttp import web

from megatron_opd.config import JudgeConfig, VerifierConfig
from megatron_opd.errors import ConfigError
from megatron_opd.records import Outcome
from megatron_opd.verifiers.judge import JudgeVerifier


class ChatServer:
    """Answers every request with ``status`` and ``body`` and keeps what it was asked."""

    def __init__(self) -> None:
        self.status, self.body, self.asked = 200, "", []
        self.loop, started = asyncio.new_event_loop(), threading.Event()
        self.thread = threading.Thread(target=self.serve, args=(started,))
        self.thread.start()
        started.wait()

    def says(self, text: object) -> None:
        self.body = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, request.headers.get("Authorization"), await request.json()))
        return web.Response(status=self.status, text=self.body)

    def serve(self, started: threading.Event) -> None:
        app = web.Application()
        app.router.add_post("/{path:.*}", self.answer)
        runner = web.AppRunner(app)
        self.loop.run_until_complete(runner.setup())
        site = web.TCPSite(runner, "127.0.0.1", 0)
        self.loop.run_until_complete(site.start())
        self.url = f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}"
        started.set()
        self.loop.run_forever()
        self.loop.run_until_complete(runner.cleanup())
        self.loop.close()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()


@pytest.fixture
def server():
    made = ChatServer()
    yield made
    made.stop()


def judge(url: str, **options: object) -> JudgeVerifier:
    config = JudgeConfig(url=url, model="grader", **options)
    return JudgeVerifier(VerifierConfig(kinds={"chat": "judge"}, judge=config, timeout_s=5))


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("Both are Paris.\nVERDICT: CORRECT", 1),
        ("verdict: incorrect\n", 0),
        ("VERDICT: CORRECT\nBut no.", -1),
        ("VERDICT: CORRECT or VERDICT: INCORRECT", -1),
        ("I cannot tell", -1),
        ("", -1),
        (None, -1),
    ],
)
def test_verdicts(server, said, expected):
    server.says(said)
    assert judge(server.url).verify("Capital of France?", "Paris", "Paris").outcome == expected


def test_what_it_is_asked(server, monkeypatch):
    monkeypatch.setenv("GRADER_TOKEN", "s3cret")
    server.says("VERDICT: CORRECT")
    judge(server.url + "/", token_env="GRADER_TOKEN").verify("Q?", "long " * 10_000 + "A", "A")
    ((path, token, body),) = server.asked
    assert (path, token, body["model"], body["temperature"]) == ("/v1/chat/completions", "Bearer s3cret", "grader", 0.0)
    case = json.loads(body["messages"][1]["content"])
    assert (case["question"], case["reference answer"], len(case["response"])) == ("Q?", "A", 20_000)


@pytest.mark.parametrize(("status", "body"), [(500, "oops"), (401, "who?"), (200, "{}"), (200, "[]"), (200, "\udcff")])
def test_a_failing_server_is_unknown(server, status, body):
    server.status, server.body = status, body.encode(errors="replace").decode()
    verdict = judge(server.url).verify("Q?", "A", "A")
    assert verdict.outcome is Outcome.UNKNOWN
    assert verdict.reason.startswith("the judge: ")


def test_no_server_is_unknown():
    verdict = judge("http://127.0.0.1:9").verify("Q?", "A", "A")
    assert verdict.outcome is Outcome.UNKNOWN
    assert verdict.reason.startswith("the judge: A server did not answer: ClientConnectorError")


def test_settings_that_are_missing():
    with pytest.raises(ValueError, match=r"kinds\.chat is judge: set judge\.url"):
        VerifierConfig(kinds={"chat": "judge"})
    with pytest.raises(ConfigError) as caught:
        judge("http://127.0.0.1:9", token_env="NO_SUCH_TOKEN")
    assert caught.value.where == "NO_SUCH_TOKEN"
