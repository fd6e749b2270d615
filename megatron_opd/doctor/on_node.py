"""Runs on each node of a SLURM job: ``python -m megatron_opd.doctor.on_node WHAT``; prints a line that doctor reads.

WHAT is a JSON object of what to look for; see ``look``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from megatron_opd.doctor.gpus import ask_gpus
from megatron_opd.doctor.machine import SHARED_MEMORY
from megatron_opd.doctor.on_nodes import tell
from megatron_opd.engines.command import gpu_present
from megatron_opd.errors import OpdError
from megatron_opd.runtime.env import environment
from megatron_opd.runtime.ports import take_port


def look(wanted: dict[str, Any], name: str) -> dict[str, Any]:
    """What the node ``name`` has of ``wanted``.

    paths: which of them are not there. ports: by node, lists of key, number and host; which are taken.
    """
    taken = [told for key, port, host in wanted["ports"].get(name, []) if (told := _taken(key, port, host))]
    gpus, problem = [], ""
    if gpu_present() and shutil.which("nvidia-smi"):
        try:
            gpus = [[gpu.name, gpu.memory_mb, gpu.used_mb, gpu.driver] for gpu in ask_gpus()]
        except OpdError as error:
            problem = " ".join(str(error).split())
    return {
        "node": name,
        "missing": [path for path in wanted["paths"] if not Path(path).exists()],
        "taken": taken,
        "gpus": gpus,
        "gpu_problem": problem,
        "shared_memory": shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
    }


def _taken(key: str, port: int, host: str) -> str:
    try:
        take_port(port, key, host)
    except OpdError as error:
        return f"{key} {port}: {error.what}"
    return ""


if __name__ == "__main__":
    tell(look(json.loads(sys.argv[1]), environment()["SLURMD_NODENAME"]))
