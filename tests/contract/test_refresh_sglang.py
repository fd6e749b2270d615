"""Weights reach the real SGLang by every way, also with tensor parallelism, and while it generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_opd.config import load_config
from megatron_opd.engines.command import server_argv, server_environment
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import start
from megatron_opd.runtime.supervision import answers

from runs import ROOT, START_LIMIT_S, TOY

TOLERANCE = 1e-4  # float32


@pytest.fixture(scope="module")
def tensor_parallel_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An engine of two ranks."""
    config = load_config(TOY, ["rollout.server.tensor_parallel=2"])
    url = f"http://127.0.0.1:{free_port()}"
    argv = server_argv(config.engine, config.rollout.server, config.student.model, url, 0)
    environment = server_environment(config.engine, config.rollout.server) | {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
    child = start("engine", argv, environment, tmp_path_factory.mktemp("engine") / "engine.log")
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while not answers(f"{url}/ready"):
            assert child.returncode is None and time.monotonic() < deadline, child.last_lines(40)
            time.sleep(0.5)
        yield url
    finally:
        for process in [*psutil.Process(child.process.pid).children(recursive=True), child.process]:
            process.kill()


@pytest.fixture(scope="module")
def found(servers, tensor_parallel_engine: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What refreshes from a real student to both engines gave."""
    work = tmp_path_factory.mktemp("refresh")
    worker = str(Path(__file__).with_name("refresh_contract_worker.py"))
    log = work / "worker.log"  # no pipe: torch's keeper of shared memory holds it open while the engine lives
    with log.open("w") as output:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", worker, str(work), servers.rollout, tensor_parallel_engine],
            check=False,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            timeout=300,
        )
    assert done.returncode == 0, log.read_text()[-6000:]
    _put_back(servers.rollout)
    return json.loads((work / "found.json").read_text())


def _put_back(url: str) -> None:
    """The shared engine serves its own model again: a refresh from files changes the path that it tells, too."""
    body = json.dumps({"model_path": "tools/toy/models/student", "weight_version": "default"}).encode()
    request = urllib.request.Request(f"{url}/update_weights_from_disk", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.load(answer)["success"]


@pytest.mark.parametrize("mode", ["broadcast", "disk", "tensor"])
def test_every_way_reaches_engines_of_one_and_two_ranks(found: dict, mode: str) -> None:
    refresh = found[mode]
    assert refresh["sizes"] == [1, 2] and len(refresh["live"]) == 2 and refresh["out"] == {}
    version = ["broadcast", "disk", "tensor"].index(mode) + 1
    assert refresh["versions"] == [str(version)] * 2
    assert refresh["difference"] <= TOLERANCE and refresh["bytes"] > 1_000_000


def test_a_stream_reaches_engines_of_one_and_two_ranks(found: dict) -> None:
    """The second broadcast: in one engine all tensors have a place, in the other the norms alone."""
    stream = found["stream"]
    assert stream["streamed"] and stream["versions"] == ["5"] * 2 and len(stream["live"]) == 2
    assert stream["difference"] <= TOLERANCE and stream["bytes"] == found["broadcast"]["bytes"]


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_a_response_under_way_goes_on_with_the_new_weights(found: dict, pause: str) -> None:
    flight = found[pause]
    first = int(flight["versions"][-1]) - 1
    assert flight["versions"] == [str(first), str(first + 1)]
    assert 0 < flight["start"] < flight["length"] - 1
    assert flight["after_is_old"] > 10 * TOLERANCE


def test_retract_computes_the_cache_anew_and_in_place_keeps_the_old_one(found: dict) -> None:
    """And the prompt's too: in the second case it was cached under weights before the old ones."""
    retract, in_place = found["retract"], found["in_place"]
    assert retract["before_is_old"] <= TOLERANCE and retract["after_is_new"] <= TOLERANCE
    assert retract["retractions"] >= 1 and in_place["retractions"] == 0
    assert in_place["before_is_old"] > 10 * TOLERANCE and in_place["after_is_new"] > 10 * TOLERANCE


def test_memory_is_given_back_and_taken_again(found: dict) -> None:
    assert len(found["memory"]) >= 1


def test_a_folder_that_cannot_be_loaded_is_an_error_and_the_engine_lives(found: dict) -> None:
    assert "refused" in found["disk_failed"] and found["disk_failed"].split()[-1] != "99"
