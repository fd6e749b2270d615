"""The Dockerfile and the compose file, as far as they can be judged without a Docker engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from clean_root import instructions

from megatron_opd.config import Config, load_config
from megatron_opd.engines.command import server_argv, server_environment

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE_TEXT = (ROOT / "compose.yaml").read_text()
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
STAGES = ("cpu", "trainer", "engine")
HOSTS = r"(docker\.io|ghcr\.io|quay\.io|nvcr\.io|gcr\.io|pypi\.|pythonhosted|\.(?:com|org|net)/)"


def steps(stage: str) -> list[tuple[str, str]]:
    return instructions(DOCKERFILE, stage)


def arguments(stage: str, keyword: str) -> list[str]:
    return [argument for name, argument in steps(stage) if name == keyword]


# ---------------------------------------------------------------- Dockerfile


def test_every_base_is_an_argument_with_a_pinned_default() -> None:
    bases = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert [stage for _, stage in bases] == list(STAGES)
    for base, _ in bases:
        name = re.fullmatch(r"\$\{(\w+)\}", base)[1]
        image = re.search(rf"^ARG {name}=(\S+)$", DOCKERFILE, re.MULTILINE)[1]
        assert re.search(r":v?\d+\.\d+\.\d+", image), image


def test_nothing_is_latest_and_no_registry_is_named() -> None:
    text = "\n".join(line for line in (DOCKERFILE + COMPOSE_TEXT).splitlines() if not line.lstrip().startswith("#"))
    assert ":latest" not in text and not re.search(HOSTS, text)


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_user_is_not_root(stage: str) -> None:
    users = arguments(stage, "USER")
    assert users and users[-1] not in ("root", "0")
    names = [name for name, _ in steps(stage)]
    assert "RUN" not in names[names.index("ENTRYPOINT") :]
    assert re.search(rf"useradd [^&]*--uid \d+ {users[-1]}", " ".join(arguments(stage, "RUN")))


@pytest.mark.parametrize("stage", STAGES)
def test_packages_leave_nothing_behind(stage: str) -> None:
    for run in arguments(stage, "RUN"):
        if "apt-get" in run:
            assert "apt-get update" in run and "rm -rf /var/lib/apt/lists/*" in run
            assert all("--no-install-recommends" in part for part in re.findall(r"apt-get install[^&]*", run))
            assert "upgrade" not in run
        assert "sudo " not in run and "curl" not in run and "wget" not in run
    if any("pip install" in run for run in arguments(stage, "RUN")):
        assert any("PIP_NO_CACHE_DIR=1" in values for values in arguments(stage, "ENV"))


@pytest.mark.parametrize("stage", STAGES)
def test_what_pip_installs_is_pinned(stage: str) -> None:
    for command in re.findall(r"pip install ([^&;]*)", " ; ".join(arguments(stage, "RUN"))):
        wanted = [word.strip('"') for word in command.split() if not word.startswith("-")]
        for word in wanted:
            assert "==" in word or word.startswith("requirements/") or word in (".", "${APEX}"), word


@pytest.mark.parametrize("stage", ["cpu", "trainer"])
def test_requirements_are_installed_before_the_code_comes(stage: str) -> None:
    order = [(name, argument) for name, argument in steps(stage) if name in ("COPY", "RUN")]
    code = next(i for i, (name, argument) in enumerate(order) if name == "COPY" and argument.endswith(". ."))
    files = next(i for i, (name, argument) in enumerate(order) if name == "COPY" and "requirements" in argument)
    installs = [i for i, (name, argument) in enumerate(order) if name == "RUN" and "-r requirements/" in argument]
    assert files < min(installs) and max(installs) < code


def test_there_are_no_secrets_and_no_remote_files() -> None:
    assert not re.search(r"(?i)\b(password|secret|api_?key|token)\b\s*[=:]", DOCKERFILE)
    assert not re.search(r"^ADD ", DOCKERFILE, re.MULTILINE)


def test_only_what_the_images_need_is_sent_to_the_builder() -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv", ".venv-*", "runs", "**/__pycache__", "models", "data"} <= set(ignored)


def test_files_that_are_copied_exist() -> None:
    for stage in STAGES:
        for copied in arguments(stage, "COPY"):
            *sources, _ = [word for word in copied.split() if not word.startswith("--")]
            assert all((ROOT / source).exists() for source in sources), copied


# ---------------------------------------------------------------- compose.yaml


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.chdir(ROOT)
    command = COMPOSE["services"]["trainer"]["command"]
    assert command[0] == "train"
    return load_config(Path(command[1]), command[2:])


def option(service: dict, name: str) -> str:
    return service["command"][service["command"].index(name) + 1]


def engines() -> dict[str, dict]:
    return {name: service for name, service in COMPOSE["services"].items() if name != "trainer"}


def test_containers_have_no_more_rights_than_they_need() -> None:
    for name, service in COMPOSE["services"].items():
        assert not {"privileged", "cap_add", "pid", "security_opt"} & set(service), name
        assert "docker.sock" not in str(service) and service.get("user") not in ("root", "0")
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        assert service["network_mode"] == "host" and service["ipc"] == "host"
        assert service["build"]["target"] in STAGES
    for name, service in engines().items():
        assert option(service, "--host") == "127.0.0.1", name  # the host's network is everybody's
        assert all(volume.endswith(":ro") for volume in service["volumes"])


def test_engines_are_where_the_trainer_looks_for_them(config: Config) -> None:
    found = {f"http://127.0.0.1:{option(service, '--port')}": service for service in engines().values()}
    wanted = {url: config.student.model for url in config.rollout.server.urls}
    wanted |= {url: teacher.model for teacher in config.teachers.values() for url in teacher.server.urls}
    assert found.keys() == wanted.keys()
    assert {url: option(service, "--model-path") for url, service in found.items()} == {
        url: str(model) for url, model in wanted.items()
    }


def test_engines_are_started_as_a_run_starts_them(config: Config) -> None:
    on_gpu = config.engine.model_copy(update={"device": "cuda"})
    for service in engines().values():
        url, model = f"http://127.0.0.1:{option(service, '--port')}", Path(option(service, "--model-path"))
        argv = server_argv(on_gpu, config.rollout.server, model, url, config.seed)
        assert service["command"] == argv[3:]  # behind python, -P and the launcher, which are the image's entry point
        variables = service["environment"]
        given = server_environment(on_gpu, config.rollout.server)
        assert all(given.get(name) == value for name, value in variables.items() if name != "CUDA_VISIBLE_DEVICES")


def test_every_gpu_has_one_owner(config: Config) -> None:
    owned = {name: one["environment"]["CUDA_VISIBLE_DEVICES"].split(",") for name, one in COMPOSE["services"].items()}
    assert sorted(gpu for gpus in owned.values() for gpu in gpus) == [str(number) for number in range(8)]
    assert len(owned["trainer"]) == config.student.ranks
