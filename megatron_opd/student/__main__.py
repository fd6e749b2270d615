"""Starts ranks of this node: ``python -m megatron_opd.student JOB RANKS HOST:PORT NODES ARGUMENT``.

Each rank is ``python -m megatron_opd.student.JOB ARGUMENT``; the RANKS are spread evenly over NODES, on each of which
this is started once, and meet at HOST:PORT. When one fails, the others are ended.
"""

from __future__ import annotations

import sys

from megatron_opd.runtime.env import be_launcher, node_rank
from megatron_opd.runtime.process import die_with_parent

if __name__ == "__main__":
    die_with_parent()
    from torch.distributed.run import main  # after it: this takes seconds, in which the parent may die

    be_launcher()
    job, ranks, meeting, nodes, argument = sys.argv[1:]
    host, port = meeting.split(":")
    main(
        [
            *("--nnodes", nodes, "--nproc-per-node", str(int(ranks) // int(nodes))),
            *("--node-rank", str(node_rank() if int(nodes) > 1 else 0)),
            *("--master-addr", host, "--master-port", port),
            *("-m", f"megatron_opd.student.{job}", argument),
        ]
    )
