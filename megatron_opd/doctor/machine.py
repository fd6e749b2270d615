"""The machine and its Python, whatever the config."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from packaging.version import Version

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, failed, ok, skipped, warning
from megatron_opd.engines.command import gpu_present, resolve_device
from megatron_opd.plan.memory import refresh_bytes
from megatron_opd.plan.shape import read_shape
from megatron_opd.runtime.env import environment
from megatron_opd.train.cluster import on_slurm

REQUIREMENTS = Path(__file__).resolve().parents[2] / "requirements"
OLDEST_PYTHON = (3, 11)
TOLD_PACKAGES = 3
SHARED_MEMORY = Path("/dev/shm")
SHARED_FOR_GPUS = 1 << 30  # bytes; a container gets 64 MB unless told otherwise, which NCCL's buffers soon fill


def check_python() -> Iterator[Finding]:
    """The version of this Python."""
    here, needed = sys.version.split()[0], f">= {'.'.join(map(str, OLDEST_PYTHON))}"
    good = sys.version_info[:2] >= OLDEST_PYTHON
    yield ok("python", here, needed) if good else failed("python", here, needed, "make .venv with another PYTHON")


def read_pins(path: Path) -> dict[str, str]:
    """Package to version, of a requirements file in which every line is NAME==VERSION or a comment."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return dict(line.split("==", 1) for line in lines if line)


def check_packages() -> Iterator[Finding]:
    """Installed versions against those that were tested."""
    path = REQUIREMENTS / ("trainer-gpu.txt" if gpu_present() else "trainer-cpu.txt")
    if not path.is_file():
        yield skipped("packages", "installed without requirements/, where the tested versions are")
        return
    pins = read_pins(path)
    found = {name: _installed(name) for name in pins}
    missing = [name for name, here in found.items() if here is None]
    other = [f"{name} {here} (tested: {pins[name]})" for name, here in found.items() if _differs(here, pins[name])]
    needed, fix = f"requirements/{path.name}", f"pip install -r requirements/{path.name}"
    if missing:
        yield failed("packages", f"not installed: {_some(missing)}", needed, fix)
    if other:
        yield warning("packages", f"other versions: {_some(other)}", needed, fix)
    if not missing and not other:
        yield ok("packages", f"{len(pins)} as in {needed}")


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _differs(here: str | None, pin: str) -> bool:
    """Builds of one version, such as 2.13.0+cpu, are the same version."""
    return here is not None and Version(here).public != Version(pin).public


def _some(items: list[str]) -> str:
    more = len(items) - TOLD_PACKAGES
    return ", ".join(items[:TOLD_PACKAGES]) + (f" and {more} more" if more > 0 else "")


def check_torch(config: Config | None) -> Iterator[Finding]:
    """Whether torch, and Transformer Engine where it is asked for, can do what the config wants."""
    if find_spec("torch") is None:
        yield failed("torch", "not installed", "torch", "make install")
        return
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    found = f"{torch.__version__}, built for {build}"
    device = resolve_device(config.student.device if config else "auto")
    if config and on_slurm(config, environment()):
        yield ok("torch", f"{found}; the student's nodes are tried by all-reduce")
    elif device == "cpu":
        yield ok("torch", f"{found}; the student runs on a CPU")
    elif torch.cuda.is_available():
        yield ok("torch", f"{found}, sees {torch.cuda.device_count()} GPUs", "a GPU")
    else:
        fix = "install a driver for this CUDA, or a torch for an older one; in a container: docker run --gpus all"
        fix = fix if torch.version.cuda else "install a torch that is built for CUDA"
        yield failed("torch", f"{found}, but it cannot use a GPU", "a GPU, or student.device=cpu", fix)
    if config and config.student.backend == "transformer_engine" and find_spec("transformer_engine") is None:
        fix = "install it (Dockerfile shows how), or set student.backend=auto"
        yield failed("torch", "Transformer Engine is not installed", "student.backend=transformer_engine", fix)


def check_shared_memory(config: Config) -> Iterator[Finding]:
    """/dev/shm: NCCL's buffers between GPUs, and those of refresh.mode=tensor."""
    if not SHARED_MEMORY.is_dir():
        yield failed("shared memory", "there is no /dev/shm", "/dev/shm", "mount a tmpfs there")
        return
    usage = shutil.disk_usage(SHARED_MEMORY)
    found = f"{size(usage.free)} free of {size(usage.total)}"
    buffered = config.refresh.mode == "tensor"
    needed = refresh_bytes(config, read_shape(config.student.model, "student.model")) if buffered else 0
    if usage.free < needed:
        fix = "docker run --shm-size=16g, or lower refresh.bucket_mb"
        yield failed("shared memory", found, f"{size(needed)} for refresh.mode=tensor", fix)
    elif resolve_device(config.student.device) == "cuda" and usage.free < SHARED_FOR_GPUS:
        yield warning(
            "shared memory", found, f"{size(SHARED_FOR_GPUS)} for NCCL", "docker run --ipc=host --shm-size=16g"
        )
    else:
        yield ok("shared memory", found, f"{size(needed)}" if needed else "")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"
