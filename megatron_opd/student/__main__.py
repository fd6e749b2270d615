"""Starts the student's ranks of this node: ``python -m megatron_opd.student RUN_DIRECTORY HOST:PORT NODES``."""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.run import main

from megatron_opd.runtime.env import node_rank
from megatron_opd.runtime.process import die_with_parent
from megatron_opd.runtime.rundir import RunDirectory

if __name__ == "__main__":
    die_with_parent()
    run_directory, meeting, nodes = sys.argv[1:]
    host, port = meeting.split(":")
    ranks = RunDirectory(Path(run_directory)).config().world_size
    main(
        [
            *("--nnodes", nodes, "--nproc-per-node", str(ranks // int(nodes))),
            *("--node-rank", str(node_rank() if int(nodes) > 1 else 0)),
            *("--master-addr", host, "--master-port", port),
            *("-m", "megatron_opd.student.worker", run_directory),
        ]
    )
