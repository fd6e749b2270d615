"""Real servers, started once for all tests that need them; each test's run attaches to them by URL."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from real_servers import running

from megatron_opd.config import load_config
from megatron_opd.runtime.ports import free_port
from megatron_opd.train.roles import assign_endpoints, replica_roles, server_roles

from runs import COMMAND, ROOT, TOY, Run, Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The rollout engine and both teachers of conf/toy.yaml."""
    with started_servers(tmp_path_factory.mktemp("servers")) as found:
        yield found


@pytest.fixture(scope="module")
def deterministic_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """The same in deterministic mode, which takes seeds and gives the same response in any company."""
    with started_servers(tmp_path_factory.mktemp("deterministic"), "engine.deterministic=true") as found:
        yield found


@contextmanager
def started_servers(logs: Path, *overrides: str) -> Iterator[Servers]:
    os.chdir(ROOT)
    config = load_config(TOY, list(overrides))
    endpoints = assign_endpoints(config)
    with running(server_roles(config, endpoints), logs):
        yield Servers(endpoints.rollout[0], endpoints.teachers["math"][0], endpoints.teachers["code"][0])


@pytest.fixture(scope="session")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM that serves the math teacher of conf/toy.yaml."""
    python = ROOT / ".venv-vllm" / "bin" / "python"
    if not python.is_file():
        pytest.skip("vLLM is not installed: make .venv-vllm")
    os.chdir(ROOT)
    config = load_config(TOY, ["teachers.math.server.engine=vllm", "scoring.top_k=5"])
    url = f"http://127.0.0.1:{free_port()}"
    teacher = config.teachers["math"]
    with running(
        replica_roles(config.engine, 0, config.scoring.top_k, "vllm", teacher.server, teacher.model, [url]),
        tmp_path_factory.mktemp("vllm"),
    ):
        yield url


@pytest.fixture
def run_train(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start ``megatron-opd train conf/toy.yaml name=NAME OVERRIDES``; everything is killed after the test."""
    runs: list[Run] = []

    def begin(name: str, *overrides: str) -> Run:
        output = tmp_path / f"{name}.out"
        argv = [str(COMMAND), "train", str(TOY), f"name={name}", f"output={tmp_path}", *overrides]
        with output.open("wb") as file:
            process = subprocess.Popen(argv, cwd=ROOT, stdout=file, stderr=file, stdin=subprocess.DEVNULL)
        runs.append(Run(process, tmp_path / name, output))
        return runs[-1]

    yield begin
    for run in runs:
        if run.process.poll() is None:
            run.process.kill()
