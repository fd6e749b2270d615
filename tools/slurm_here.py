"""A real SLURM cluster of virtual nodes on this machine while a command runs; needs root, `slurm-wlm` and `munge`.

    python tools/slurm_here.py sbatch --wait --nodes=3 launch/train_multi_teacher.sh conf/toy.yaml name=toy-slurm
    python tools/slurm_here.py --nodes 2 --cpus 4 bash

The command sees the cluster by SLURM_CONF, so sbatch, squeue and scancel in another shell need that variable too; it is
printed. With `sbatch --wait` the job's exit code is the tool's. Everything is ended when the command ends.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/support"))

from slurm_cluster import missing, start_cluster


def main() -> int:
    options = arguments()
    if reason := missing():
        sys.exit(reason)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the cluster is ended too
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        cluster = start_cluster(Path(folder) / "cluster", options.nodes, cpus=options.cpus, gpus=options.gpus)
        try:
            print(f"{options.nodes} nodes; SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
            return subprocess.run(options.command, env=cluster.environment, check=False).returncode
        finally:
            cluster.stop()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, default=4, help="virtual nodes, n1 and so on")
    parser.add_argument("--cpus", type=int, default=2, help="processors that each of them claims to have")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that SLURM deals out on each node but the first")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run, with its arguments")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command")
    return options


if __name__ == "__main__":
    sys.exit(main())
