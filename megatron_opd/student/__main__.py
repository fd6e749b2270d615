"""Starts the student's ranks on this machine: ``python -m megatron_opd.student RUN_DIRECTORY MASTER_PORT``."""

from __future__ import annotations

import sys
from pathlib import Path

from torch.distributed.run import main

from megatron_opd.runtime.process import die_with_parent
from megatron_opd.runtime.rundir import RunDirectory

if __name__ == "__main__":
    die_with_parent()
    run_directory, port = sys.argv[1:]
    ranks = RunDirectory(Path(run_directory)).config().world_size
    main(
        [
            *("--nnodes", "1", "--nproc-per-node", str(ranks)),
            *("--master-addr", "127.0.0.1", "--master-port", port),
            *("-m", "megatron_opd.student.worker", run_directory),
        ]
    )
