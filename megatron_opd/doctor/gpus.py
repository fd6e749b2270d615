"""The GPUs of this machine, and which processes of the run each of them would get."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, failed, ok, skipped, warning
from megatron_opd.engines.command import gpu_present, resolve_device
from megatron_opd.errors import ProcessError
from megatron_opd.runtime.env import environment
from megatron_opd.train.cluster import on_slurm, servers_of

QUERY = ("index", "name", "memory.total", "memory.used", "driver_version")
ANSWER_LIMIT_S = 30.0
USED_SHARE = 0.05  # of a GPU's memory: the driver itself takes less


@dataclass(frozen=True)
class Gpu:
    """One GPU as nvidia-smi tells it."""

    index: int
    name: str
    memory_mb: int
    used_mb: int
    driver: str


def parse_gpus(text: str) -> list[Gpu]:
    """The answer to ``QUERY`` in CSV without header and units. Raises ValueError."""
    rows = [[part.strip() for part in line.split(",")] for line in text.splitlines() if line.strip()]
    return [Gpu(int(index), name, int(total), int(used), driver) for index, name, total, used, driver in rows]


def ask_gpus() -> list[Gpu]:
    """All GPUs of this machine. Raises ProcessError when nvidia-smi does not tell."""
    return parse_gpus(_ask("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"))


def gpu_map(config: Config, visible: list[str]) -> dict[str, list[str]]:
    """GPU, by the name that CUDA_VISIBLE_DEVICES has for it, to the roles that would run on it, on one machine.

    A GPU that a role needs and that is not there is named "missing".
    """
    roles: dict[str, list[str]] = defaultdict(list)

    def first(count: int) -> list[str]:
        return [*visible[:count], *["missing"] * (count - len(visible))]

    if resolve_device(config.student.device) == "cuda":
        for gpu in first(config.student.ranks):
            roles[gpu].append("student")
    if resolve_device(config.engine.device) == "cuda":
        for role, server in servers_of(config).items():
            for replica in range(0 if server.urls else server.replicas):
                given = server.gpus_of(replica)
                mine = first(server.tensor_parallel) if given is None else given.split(",")
                for gpu in mine:
                    roles[gpu if gpu in visible else "missing"].append(role)
    return {gpu: list(dict.fromkeys(names)) for gpu, names in roles.items()}


def check_gpus(config: Config | None) -> Iterator[Finding]:
    """Driver, memory that others use, and whether every role has GPUs of its own."""
    if config and on_slurm(config, environment()):
        yield skipped("GPUs", "those of the job count: see nodes")
        return
    wants = {config.student.device, config.engine.device} if config else set()
    if not gpu_present():
        if "cuda" in wants:
            fix = "in a container: docker run --gpus all; else install the driver, or set the device to cpu"
            yield failed("GPUs", "no NVIDIA GPU here", "student.device or engine.device is cuda", fix)
        else:
            yield skipped("GPUs", "none here: everything runs on the CPU")
        return
    if shutil.which("nvidia-smi") is None:
        yield warning("GPUs", "a driver, but no nvidia-smi to ask", "nvidia-smi", "install the driver's tools")
        return
    gpus = ask_gpus()
    kinds = ", ".join(f"{_count(gpus, name)} x {name}" for name in dict.fromkeys(gpu.name for gpu in gpus))
    cuda = re.search(r"CUDA Version\s*:\s*([\d.]+)", _ask("nvidia-smi"))
    newest = f" (CUDA up to {cuda[1]})" if cuda else ""
    yield ok("GPUs", f"{kinds}, {gpus[0].memory_mb:,} MB each, driver {gpus[0].driver}{newest}")
    used = [f"GPU {gpu.index}: {gpu.used_mb:,} MB" for gpu in gpus if gpu.used_mb > USED_SHARE * gpu.memory_mb]
    if used:
        yield warning("GPUs", f"in use already: {', '.join(used)}", "free GPUs", "nvidia-smi shows whose processes")
    if config:
        yield _map_finding(config, gpus)


def _map_finding(config: Config, gpus: list[Gpu]) -> Finding:
    given = environment().get("CUDA_VISIBLE_DEVICES")
    visible = [str(gpu.index) for gpu in gpus] if given is None else given.split(",")
    roles = gpu_map(config, visible)
    lacking = roles.pop("missing", [])
    told = "; ".join(f"{gpu}: {', '.join(names)}" for gpu, names in roles.items())
    if lacking:
        fix = "lower parallel sizes, set gpus of the servers, or attach to servers elsewhere by urls"
        return failed("GPU map", f"no GPU for a part of {', '.join(lacking)}", f"have {','.join(visible)}", fix)
    lent = {"student", "rollout"} if config.rollout.colocate else set()
    if any(len(names) > 1 and set(names) != lent for names in roles.values()):
        fix = "set gpus of each server, or lower engine.memory_fraction so that they fit beside each other"
        return warning("GPU map", f"shared: {told}", "a GPU for each role", fix)
    return ok("GPU map", told)


def _count(gpus: list[Gpu], name: str) -> int:
    return sum(gpu.name == name for gpu in gpus)


def _ask(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=ANSWER_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessError("nvidia-smi does not answer", got=error, fix="the driver may hang: see dmesg") from error
    if done.returncode != 0:
        fix = "driver and kernel module may be of different versions: reboot, or install the driver again"
        raise ProcessError("nvidia-smi failed", got=(done.stdout + done.stderr).strip(), fix=fix)
    return done.stdout
