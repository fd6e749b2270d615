"""The only place that reads or sets environment variables."""

from __future__ import annotations

import netrc
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from megatron_opd.errors import ConfigError

ENGINE_KEY = "OPD_ENGINE_KEY"  # bearer token of started servers that other machines can reach; also in the launcher
VLLM_KEY = "VLLM_API_KEY"  # the same as vLLM reads it
LAUNCHER = "OPD_LAUNCHER"  # process id of what starts ranks
TOKEN = "OPD_TOKEN"  # bearer token of the coordinator; made anew for each run, never written to a file


def new_token() -> str:
    """A fresh bearer token."""
    return secrets.token_urlsafe(32)


def token() -> str:
    """The bearer token that this process was started with."""
    return os.environ[TOKEN]


def secret(name: str) -> str:
    """The value of a variable that holds a key. Raises ConfigError, which names the variable, when there is none."""
    value = os.environ.get(name, "")
    if not value:
        fix = f"export {name}=... before the start"
        raise ConfigError("The environment lacks a key", where=name, got="empty or not set", fix=fix)
    return value


def engine_key() -> str | None:
    """The bearer token of servers that the run started; None where they listen on loopback alone."""
    return os.environ.get(ENGINE_KEY)


def environment() -> Mapping[str, str]:
    """All variables of this process, to be read."""
    return os.environ


def requeued() -> bool:
    """Whether SLURM has started this job before."""
    return int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0


def node_rank() -> int:
    """Number of this node among those that srun started the process on; 0 without srun."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def rank() -> int:
    """Global rank that torchrun gave to this process."""
    return int(os.environ["RANK"])


def local_rank() -> int:
    """Rank on this machine that torchrun gave to this process."""
    return int(os.environ["LOCAL_RANK"])


def world_size() -> int:
    """Ranks that torchrun started."""
    return int(os.environ["WORLD_SIZE"])


def launcher() -> int | None:
    """Process that has started this rank; None for others."""
    found = os.environ.get(LAUNCHER)
    return None if found is None else int(found)


def be_launcher() -> None:
    """Let the ranks that this process is about to start know it."""
    os.environ[LAUNCHER] = str(os.getpid())


def wandb_mode() -> str:
    """WANDB_MODE where it is set; else "online" with a key (WANDB_API_KEY, or in ~/.netrc) and "offline" without."""
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    has_key = bool(os.environ.get("WANDB_API_KEY")) or _in_netrc(host)
    return os.environ.get("WANDB_MODE") or ("online" if has_key else "offline")


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


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
