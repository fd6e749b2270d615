"""Starts one process on each node of a role's place, as the run itself would, and reads what each of them tells."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from megatron_opd.config import Config
from megatron_opd.errors import ConfigError, ProcessError
from megatron_opd.runtime.env import environment
from megatron_opd.train.cluster import Cluster, find_cluster

MARK = "doctor-found:"  # before a line that is meant; srun and containers have lines of their own
SHOWN_LINES = 3


def known_cluster(config: Config) -> Cluster | None:
    """As ``find_cluster``; None where the roles do not fit, which the check of the placement tells."""
    try:
        return find_cluster(config, environment())
    except ConfigError:
        return None


def tell(found: Any) -> None:
    """Print ``found``, which JSON can hold, for the process that waits in ``ask_nodes``."""
    sys.stdout.write(f"{MARK}{json.dumps(found)}\n")


def ask_nodes(cluster: Cluster, role: str, module: str, arguments: list[str], limit_s: float) -> list[Any]:
    """What ``python -m module`` told on each node of ``role``, in any order.

    Raises ProcessError when srun or one of the processes failed or took longer than ``limit_s``.
    """
    python = cluster.config.trainer_python or sys.executable
    argv = cluster.command(role, [python, "-m", module, *arguments], cluster.config.trainer_image)
    where = ", ".join(node.name for node in cluster.places[role].nodes)
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ProcessError(f"srun on {where}", got=type(error).__name__, fix="see squeue --steps, sinfo") from error
    found = [json.loads(line.partition(MARK)[2]) for line in done.stdout.splitlines() if MARK in line]
    if done.returncode or len(found) < cluster.nodes(role):
        said = " | ".join([line for line in done.stderr.splitlines() if line.strip()][-SHOWN_LINES:])
        got = f"{len(found)} of {cluster.nodes(role)} nodes answered, exit code {done.returncode}; {said}"
        raise ProcessError(f"srun on {where}", got=got, fix="see cluster.srun and docs/cluster.md")
    return found
