"""What the config asks of this machine: places, ports, disk, folder, sinks; and its own arithmetic."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.doctor.finding import Finding, by_error, failed, ok, skipped, warning
from megatron_opd.doctor.machine import processors, size
from megatron_opd.engines.command import resolve_device
from megatron_opd.observe.sinks import check_sinks
from megatron_opd.plan.activations import VALUE_BYTES
from megatron_opd.plan.memory import checkpoint_bytes
from megatron_opd.plan.shape import read_shape
from megatron_opd.runtime.env import environment, requeued, wandb_mode
from megatron_opd.runtime.ports import take_port
from megatron_opd.train.cluster import demands, find_cluster, on_slurm, servers_of
from megatron_opd.train.preflight import attempt

CROWDED = 4  # busy threads per processor


def check_batch(config: Config) -> Iterator[Finding]:
    """Rollouts of a step, and how they fill the copies of the student and their rows."""
    rollout, student = config.rollout, config.student
    total = rollout.prompts_per_step * rollout.samples_per_prompt
    found = f"{rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} = {total} rollouts a step"
    longest = config.data.max_prompt_tokens + rollout.max_new_tokens
    if total < student.data_parallel:
        fix = "lower student.data_parallel, or raise rollout.prompts_per_step"
        yield failed("batch", found, f"one for each of {student.data_parallel} copies of the student", fix)
    elif total % student.data_parallel:
        fix = "make rollouts a multiple of student.data_parallel, if no copy is to wait for another"
        yield warning("batch", found, f"equal shares for {student.data_parallel} copies", fix)
    elif longest > student.row_tokens:
        needed = f"row_tokens {student.row_tokens:,} >= {longest:,}, the longest sequence"
        yield warning("batch", f"{found}; a long one fills a row beyond row_tokens", needed, "plan for that memory")
    else:
        yield ok("batch", found)


def check_placement(config: Config) -> Iterator[Finding]:
    """Whether all roles fit: on the nodes of a SLURM job, or beside each other here."""
    cluster = find_cluster(config, environment())
    if cluster.allocation is not None:
        nodes = len(cluster.allocation.nodes)
        told = "; ".join(f"{role}: {place.told()}" for role, place in cluster.places.items())
        yield ok("placement", f"SLURM job {cluster.allocation.job}, {nodes} nodes: {told}")
        return
    wanted = sum(demand.units for demand in demands(config, on_gpus=False))
    found = f"one machine, {processors()} processors"
    needed = f"{wanted} busy threads"
    if resolve_device(config.student.device) == "cpu" and wanted > CROWDED * processors():
        yield warning("placement", found, needed, "it works, slowly: lower parallel sizes, or take a larger machine")
    else:
        yield ok("placement", found, needed)


def check_run_folder(config: Config) -> Iterator[Finding]:
    """Whether the folder may be written, and is not an older run's."""
    existing = nearest_folder(config.run_dir)
    if not os.access(existing, os.W_OK):
        yield failed("run folder", f"{existing} cannot be written", "a folder of yours", "set output")
    elif not config.run_dir.exists():
        yield ok("run folder", f"{config.run_dir} is new")
    elif config.existing == "refuse" and not requeued():
        fix = "another name=..., or existing=archive or existing=resume"
        yield failed("run folder", f"{config.run_dir} exists", "a new folder", fix)
    else:
        doing = {"archive": "moved aside", "resume": "gone on with"}.get(config.existing, "gone on with")
        yield ok("run folder", f"{config.run_dir} exists and will be {doing}")


def wanted_ports(config: Config) -> list[tuple[str, int]]:
    """Key and number of every port that is fixed and that this machine would open."""
    ports = [("coordinator.port", config.coordinator.port), ("refresh.port", config.refresh.port)]
    for role, server in servers_of(config).items():
        if server.port:
            ports += [(f"port of {role}", server.port + number) for number in range(server.replicas)]
    return [(key, port) for key, port in ports if port]


def check_ports(config: Config) -> Iterator[Finding]:
    """Every fixed port: free, and asked for once."""
    ports = wanted_ports(config)
    if not ports:
        yield ok("ports", "none is fixed: free ones are taken")
        return
    if on_slurm(config, environment()):
        yield skipped("ports", "tried where they will be opened: see nodes")
        return
    owners: dict[int, list[str]] = {}
    for key, port in ports:
        owners.setdefault(port, []).append(key)
    twice = [(port, ", ".join(keys)) for port, keys in owners.items() if len(keys) > 1]
    bad = [failed("ports", f"{port}: {keys}", "a port for each", "change one of them") for port, keys in twice]
    hosts = {"coordinator.port": config.coordinator.host, "refresh.port": config.refresh.host}
    for key, port in ports:
        bad += [
            by_error("ports", error)
            for error in attempt(lambda k=key, p=port: take_port(p, k, hosts.get(k) or "127.0.0.1"))
        ]
    yield from bad or [ok("ports", ", ".join(str(port) for port in owners) + " free")]


def kept_checkpoints(config: Config) -> int:
    """Most checkpoints that are on the disk at a time: one more than are kept, while it is written."""
    every = config.checkpoint.every_steps
    if not every:
        return 0
    saved = -(-config.steps // every)
    for_good = config.steps // config.checkpoint.keep_every if config.checkpoint.keep_every else 0
    return min(saved, config.checkpoint.keep_last + 1 + for_good)


def check_disk(config: Config) -> Iterator[Finding]:
    """Room for checkpoints, the export, and weights on their way by files."""
    if not (config.student.model / "config.json").is_file():
        yield skipped("disk", "student.model is missing, which tells the size of a checkpoint")
        return
    shape = read_shape(config.student.model, "student.model")
    count, each = kept_checkpoints(config), checkpoint_bytes(config, shape)
    weights = shape.params * VALUE_BYTES[config.student.dtype]
    on_way = 2 * weights if config.refresh.mode == "disk" else 0
    shared = config.refresh.folder if on_way else None
    parts = [f"{count} checkpoints of {size(each)}", f"export {size(weights)}"]
    parts += [f"refresh {size(on_way)}"] if on_way and not shared else []
    needed = count * each + weights + (0 if shared else on_way)
    yield _room(config.run_dir, needed, " + ".join(parts))
    if shared:
        yield _room(shared, on_way, "two versions of the weights")


def _room(folder: Path, needed: float, why: str) -> Finding:
    free = shutil.disk_usage(nearest_folder(folder)).free
    found, told = f"{size(free)} free for {folder}", f"{size(needed)}: {why}"
    if free < needed:
        return failed("disk", found, told, "free some, set output, or lower checkpoint.keep_last")
    return ok("disk", found, told)


def nearest_folder(path: Path) -> Path:
    """``path``, or the nearest folder above it that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.is_dir())


def check_sink_modes(config: Config) -> Iterator[Finding]:
    """TensorBoard and wandb: installed, and whether wandb has a key."""
    wanted = [name for name in ("wandb", "tensorboard") if getattr(config.sinks, name)]
    if not wanted:
        yield skipped("sinks", "all off; metrics.jsonl has every number")
        return
    check_sinks(config.sinks)
    mode = wandb_mode() if config.sinks.wandb else ""
    if mode == "offline":
        fix = "export WANDB_API_KEY=..., or send it later: wandb sync RUN/wandb/offline-run-*"
        yield warning("sinks", f"{' and '.join(wanted)}; wandb is offline: no key, or WANDB_MODE", "a key", fix)
    else:
        yield ok("sinks", " and ".join(wanted) + (f"; wandb is {mode}" if mode else ""))
