"""Starts ranks on this machine: ``python -m megatron_opd.student JOB RANKS MASTER_PORT ARGUMENT``.

Each rank is ``python -m megatron_opd.student.JOB ARGUMENT``. When one fails, the others are ended.
"""

from __future__ import annotations

import sys

from torch.distributed.run import main

from megatron_opd.runtime.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    job, ranks, port, argument = sys.argv[1:]
    main(
        [
            *("--nnodes", "1", "--nproc-per-node", ranks),
            *("--master-addr", "127.0.0.1", "--master-port", port),
            *("-m", f"megatron_opd.student.{job}", argument),
        ]
    )
