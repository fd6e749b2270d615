"""Servers that are silent, deny, or serve something else; engines that cannot be imported; verifiers at work."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from megatron_opd.doctor import servers, verifying
from megatron_opd.doctor.finding import ok
from megatron_opd.doctor.servers import check_engines, check_handshakes
from megatron_opd.doctor.verifying import CASES, check_sandbox, check_verifiers
from megatron_opd.verifiers import VERIFIERS
from megatron_opd.verifiers.sandbox import Probe


@pytest.fixture
def engine() -> Iterator[tuple[str, dict[str | int, object]]]:
    """URL of a server, its answers by path, and log-probs by where a request starts; it denies every other path."""
    answers: dict[str | int, object] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path in answers
            self.send_response(200 if known else 401)
            self.end_headers()
            self.wfile.write(json.dumps(answers[self.path]).encode() if known else b"a key is needed")

        def do_POST(self) -> None:
            """Scores as SGLang does; each token has the same log-prob, unless ``answers`` has one for a prompt."""
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids, start = asked["input_ids"], asked["logprob_start_len"]
            logprob = answers.get(start, -1.0)
            rows = [[None if place == 0 else logprob, token, None] for place, token in enumerate(ids[start:])]
            meta = {"id": asked["rid"], "finish_reason": {"type": "length"}, "prompt_tokens": len(ids)}
            meta |= {"cached_tokens": 0, "weight_version": "default", "input_token_logprobs": rows}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"meta_info": meta}).encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_nothing_to_ask(settings, only) -> None:
    assert only(check_handshakes(settings())).state == "skipped"


def test_a_server_that_is_not_there(settings, only, monkeypatch) -> None:
    monkeypatch.setattr(servers, "ANSWER_LIMIT_S", 0.0)
    finding = only(check_handshakes(settings("teachers.math.server.urls=[http://127.0.0.1:9]")))
    assert finding.state == "failed" and "http://127.0.0.1:9/ready does not answer" in finding.found
    assert finding.needed == "a server of teachers.math" and "teachers.math.server.urls" in finding.fix


def test_a_server_that_wants_a_key(settings, only, engine) -> None:
    finding = only(check_handshakes(settings(f"rollout.server.urls=[{engine[0]}]")))
    assert finding.state == "failed" and "401" in finding.found and finding.fix == "set rollout.server.api_key_env"


def test_a_wrong_teacher(settings, only, engine) -> None:
    url, answers = engine
    answers |= {
        "/ready": {},
        "/model_info": {"model_path": "/models/code", "weight_version": "default"},
        "/server_info": {"max_req_input_len": 4096},
    }
    finding = only(check_handshakes(settings(f"teachers.math.server.urls=[{url}]")))
    assert finding.state == "failed" and finding.found.startswith("A server of teachers.math serves another model")
    assert "/models/code" in finding.found and "model_path=/models/code" in finding.fix


def test_a_right_teacher_and_one_that_scores_in_two_ways(settings, only, engine) -> None:
    url, answers = engine
    answers |= {
        "/ready": {},
        "/model_info": {"model_path": "/models/math", "weight_version": "default"},
        "/server_info": {"max_req_input_len": 4096},
    }
    config = settings(f"teachers.math.server.urls=[{url}]")
    assert only(check_handshakes(config)) == ok("handshakes", f"teachers.math: {url}")
    answers[31] = -2.0  # where the prompt has 32 tokens
    finding = only(check_handshakes(config))
    assert finding.state == "failed" and "two different scores" in finding.found and "prompt of 32" in finding.found


def test_a_server_that_is_no_engine(settings, only, engine) -> None:
    url, answers = engine
    answers |= {"/ready": {}, "/model_info": {"name": "nginx"}, "/server_info": {}}
    finding = only(check_handshakes(settings(f"teachers.math.server.urls=[{url}]")))
    assert finding.state == "failed" and "does not say what it serves" in finding.found


def test_an_environment_without_the_engine(settings, only, tmp_path: Path) -> None:
    finding = only(check_engines(settings("engine.python=/nowhere/python")))
    assert finding.state == "failed" and "engine's Python does not exist" in finding.found
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho \"ModuleNotFoundError: No module named 'sglang'\" >&2\nexit 1\n")
    broken.chmod(0o755)
    finding = only(check_engines(settings(f"engine.python={broken}")))
    assert finding.state == "failed" and "No module named 'sglang'" in finding.found and "make install" in finding.fix


def test_an_engine_of_another_version(settings, only, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho sglang 0.4.0\n")
    other.chmod(0o755)
    finding = only(check_engines(settings(f"engine.python={other}")))
    assert finding.state == "warning" and "sglang 0.4.0" in finding.found and "sglang==0.5.21" in finding.fix


def test_attached_servers_need_no_engine_here(settings, only) -> None:
    urls = [f"{key}.server.urls=[http://a:{port}]" for port, key in enumerate(("rollout", "teachers.math"), 1)]
    assert only(check_engines(settings(*urls, "teachers.code=null"))).state == "skipped"


# ---------------------------------------------------------------- verifiers and sandbox


def test_every_verifier_that_judges_has_a_case() -> None:
    assert set(CASES) == set(VERIFIERS) - {"none"}


def test_verifiers_tell_right_from_wrong_in_the_processes_of_a_run(settings) -> None:
    kinds = {"a": "choice", "b": "exact", "c": "numeric", "d": "chartqa", "e": "anls", "f": "none"}
    kinds |= {"math": "math", "code": "code"}
    changes = [f"verifiers.kinds.{domain}={kind}" for domain, kind in kinds.items()]
    changes += [f"teachers.{domain}.model=tools/toy/models/math" for domain in kinds]
    found = list(check_verifiers(settings(*changes, "verifiers.workers=1", "verifiers.timeout_s=60")))
    assert {one.state for one in found if "none" not in one.found} == {"ok"} and len(found) == len(kinds)
    assert [one.found for one in found if one.state == "skipped"] == ["none judges nothing"]


def test_a_verifier_that_cannot_tell(settings, monkeypatch, only) -> None:
    monkeypatch.setitem(verifying.CASES, "choice", ("B", "The answer is C.", "The answer is D."))  # as if it judged so
    kinds = ("verifiers.kinds.math=choice", "verifiers.timeout_s=60")
    finding = only(check_verifiers(settings("teachers.code=null", *kinds)))
    assert finding.state == "failed" and "a right answer is incorrect (got C, expected B)" in finding.found


@pytest.mark.parametrize(
    ("works", "wanted", "state"),
    [
        ({"namespaces", "limits"}, "best", "ok"),
        ({"limits"}, "best", "warning"),
        (set(), "best", "failed"),
        ({"limits"}, "namespaces", "failed"),
        ({"bubblewrap", "limits"}, "limits", "warning"),
    ],
)
def test_the_level_in_force(settings, only, monkeypatch, works, wanted, state) -> None:
    levels = ("bubblewrap", "namespaces", "limits")
    probes = [Probe(level, level in works, "" if level in works else "not here") for level in levels]
    monkeypatch.setattr(verifying, "probes", lambda: probes)
    assert only(check_sandbox(settings(f"verifiers.sandbox={wanted}"))).state == state


def test_no_code_no_sandbox(settings, only) -> None:
    assert only(check_sandbox(settings("teachers.code=null"))).state == "skipped"
