"""The only place that reads or sets environment variables."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from megatron_opd.errors import ConfigError

TOKEN = "OPD_TOKEN"  # bearer token of the coordinator; made anew for each run, never written to a file


def new_token() -> str:
    """A fresh bearer token."""
    return secrets.token_urlsafe(32)


def token() -> str:
    """The bearer token that this process was started with."""
    return os.environ[TOKEN]


def named_secret(name: str) -> str:
    """The value of an environment variable that the config names. Raises ConfigError if it is not set."""
    value = os.environ.get(name)
    if not value:
        raise ConfigError("An environment variable is not set", where=name, fix=f"export {name}=... before the start")
    return value


def rank() -> int:
    """Global rank that torchrun gave to this process."""
    return int(os.environ["RANK"])


def local_rank() -> int:
    """Rank on this machine that torchrun gave to this process."""
    return int(os.environ["LOCAL_RANK"])


def world_size() -> int:
    """Ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def quiet_transformers() -> None:
    """Keep transformers from telling that it has no torch, where only its tokenizers are used."""
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"


def child_environment(**values: str) -> dict[str, str]:
    """This process's environment plus what every child of a run needs, plus ``values``."""
    package_parent = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(part for part in (package_parent, os.environ.get("PYTHONPATH")) if part)
    common = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        # Megatron overlaps communication with matrix products in the order of launch: one hardware queue keeps it.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
    return os.environ | common | values


def engine_environment(**values: str) -> dict[str, str]:
    """Environment of a server in the engine's own Python: without this environment's import path or our token."""
    inherited = {key: value for key, value in child_environment().items() if key not in ("PYTHONPATH", TOKEN)}
    return inherited | values
