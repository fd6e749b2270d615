"""Real servers, started once for all tests that need them; each test's run attaches to them by URL."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from megatron_opd.config import load_config
from megatron_opd.runtime.ports import free_port
from megatron_opd.runtime.process import start
from megatron_opd.runtime.supervision import answers
from megatron_opd.train.roles import Role, assign_endpoints, replica_roles, server_roles

from runs import ROOT, START_LIMIT_S, TOY, Run, Servers, starting


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


@contextmanager
def running(roles: list[Role], logs: Path) -> Iterator[None]:
    """These servers, once all of them answer; they are killed afterwards."""
    children = [start(role.name, role.argv, role.environment, logs / f"{role.name}.log") for role in roles]
    try:
        deadline = time.monotonic() + START_LIMIT_S
        for role, child in zip(roles, children, strict=True):
            while not answers(role.ready_url):
                assert child.returncode is None and time.monotonic() < deadline, child.last_lines(40)
                time.sleep(0.5)
        yield
    finally:
        for child in children:
            with suppress(psutil.NoSuchProcess):  # one that died while it started
                for process in [*psutil.Process(child.process.pid).children(recursive=True), child.process]:
                    process.kill()


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
    with starting(tmp_path) as begin:

        def train(name: str, *overrides: str) -> Run:
            return begin(tmp_path / name, "train", str(TOY), f"name={name}", f"output={tmp_path}", *overrides)

        yield train
