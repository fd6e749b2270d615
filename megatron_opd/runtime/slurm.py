"""What SLURM says of the job that this process runs in: nodes, addresses, processors and GPUs."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_opd.errors import ProcessError

COMMAND_LIMIT_S = 60.0


@dataclass(frozen=True)
class Node:
    """One node of an allocation."""

    name: str  # as srun's --nodelist wants it
    address: str  # as other nodes reach it
    cpus: int  # that the job was given there
    gpus: int  # that the job was given there
    het_group: int | None = None  # component of a heterogeneous job; None in an ordinary one


@dataclass(frozen=True)
class Allocation:
    """The nodes of one job, in SLURM's order."""

    job: str
    nodes: tuple[Node, ...]


def in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment runs inside a job."""
    return "SLURM_JOB_ID" in environment


def read_allocation(environment: Mapping[str, str]) -> Allocation:
    """The job of a process with this environment. Raises ProcessError when SLURM cannot be asked."""
    groups = int(environment.get("SLURM_HET_SIZE", "0"))
    if not groups:
        return Allocation(environment["SLURM_JOB_ID"], _nodes(environment, "", None))
    parts = [_nodes(environment, f"_HET_GROUP_{number}", number) for number in range(groups)]
    return Allocation(environment["SLURM_JOB_ID"], tuple(node for part in parts for node in part))


def _nodes(environment: Mapping[str, str], suffix: str, het_group: int | None) -> tuple[Node, ...]:
    job = environment[f"SLURM_JOB_ID{suffix}"]
    names = _hostnames(environment[f"SLURM_JOB_NODELIST{suffix}"])
    cpus = expand_counts(environment[f"SLURM_JOB_CPUS_PER_NODE{suffix}"])
    gpus = _gpus(_ask("scontrol", "show", "job", job, "--details", "--oneliner"), job)
    lines = _ask("scontrol", "show", "node", ",".join(names), "--oneliner").splitlines()
    addresses = dict(map(name_and_address, lines))
    return tuple(
        Node(name, addresses[name], count, gpus.get(name, 0), het_group)
        for name, count in zip(names, cpus, strict=True)
    )


def _hostnames(nodelist: str) -> list[str]:
    return _ask("scontrol", "show", "hostnames", nodelist).split()


def _gpus(answer: str, job: str) -> dict[str, int]:
    """GPUs of the job on each node. The environment has those of the first node, and none of a further component."""
    # Asked for the first component of a heterogeneous job it tells of all.
    [line] = [line for line in answer.splitlines() if line.startswith(f"JobId={job} ")]
    return {name: count for nodelist, count in dealt_gpus(line) for name in _hostnames(nodelist)}


def dealt_gpus(line: str) -> list[tuple[str, int]]:
    """Nodes and GPUs of each of them, out of a line of ``scontrol show job --details --oneliner``.

    "Nodes=n[1-2] CPU_IDs=0-7 Mem=0 GRES=gpu:h100:8(IDX:0-7)" is ("n[1-2]", 8).
    """
    found = re.findall(r" Nodes=(\S+) CPU_IDs=\S+ Mem=\S+ GRES=(\S*)", line)
    return [(nodes, sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)))) for nodes, gres in found]


def expand_counts(text: str) -> list[int]:
    """SLURM's short form of a number for each node: "2(x3),1" is 2, 2, 2, 1."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",")]
    return [int(part[1]) for part in found for _ in range(int(part[2] or 1))]


def name_and_address(line: str) -> tuple[str, str]:
    """Name and address out of a line of ``scontrol show node --oneliner``."""
    fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
    return fields["NodeName"], fields["NodeAddr"]


def requeue(job: str) -> None:
    """Put the job back into the queue: SLURM ends this process and starts the job again. Raises ProcessError."""
    _ask("scontrol", "requeue", job)


def end_steps(job: str) -> None:
    """Kill whatever srun started in the job; the batch script, this process among it, goes on. Raises ProcessError."""
    steps = _ask("squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i").split()
    started = [step for step in steps if step.rpartition(".")[2].isdigit()]  # others: the batch script itself
    if started:
        _ask("scancel", "--signal=KILL", *started)


def _ask(*argv: str) -> str:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessError("SLURM cannot be asked", where=" ".join(argv), got=error) from error
    if done.returncode != 0:
        raise ProcessError("SLURM refused a command", where=" ".join(argv), got=done.stderr.strip())
    return done.stdout
