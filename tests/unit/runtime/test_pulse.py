"""Silence of a server: only questions without an answer count, and any answer ends it."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from megatron_opd.runtime import pulse as pulse_module
from megatron_opd.runtime.pulse import Pulse
from megatron_opd.runtime.supervision import answers, responds


class Threads:
    """Runs what it is given when ``work`` is called."""

    def __init__(self) -> None:
        self.given: list[tuple[Future[bool], Callable[[str, float], bool], tuple[str, float]]] = []

    def submit(self, ask: Callable[[str, float], bool], *arguments: str | float) -> Future[bool]:
        self.given.append((Future(), ask, arguments))
        return self.given[-1][0]

    def work(self) -> None:
        for future, ask, arguments in self.given:
            future.set_result(ask(*arguments))
        self.given.clear()


def test_silence_is_between_questions_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    said, threads = {"answers": True}, Threads()
    monkeypatch.setattr(pulse_module, "responds", lambda url, timeout_s: said["answers"])
    pulse = Pulse("http://x", threads, every_s=5)

    def look(now: float) -> float:
        silence = pulse.silence_s(now)
        threads.work()
        return silence

    assert [look(now) for now in (100, 101, 105, 110)] == [0, 0, 0, 0]
    said["answers"] = False
    assert [look(now) for now in (115, 116, 120, 121, 125, 126)] == [0, 0, 0, 5, 5, 10]
    assert [look(now) for now in (1000,)] == [10]  # nobody asked meanwhile
    said["answers"] = True
    assert [look(now) for now in (1005, 1006)] == [885, 0]


def test_a_question_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads()
    pulse = Pulse("http://x", threads, every_s=5)
    assert [pulse.silence_s(now) for now in (0, 10, 20)] == [0, 0, 0] and len(threads.given) == 1


class Refusing(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(503)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_refuses_answers_and_one_that_says_nothing_does_not() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert responds(f"http://127.0.0.1:{server.server_port}/ready", 2)
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert not answers(f"http://127.0.0.1:{server.server_port}/ready")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections, as the kernel does for one that hangs
        assert not responds(f"http://127.0.0.1:{silent.getsockname()[1]}/ready", 0.5)
