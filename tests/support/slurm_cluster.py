"""A real SLURM cluster of several virtual nodes on this machine: munged, slurmctld and one slurmd for each node.

Needs root and Debian's packages ``slurm-wlm`` and ``munge``. Everything it writes lies in one folder, whose
``environment`` makes sbatch, srun and the like speak to it.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
START_LIMIT_S = 30.0
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,requeue_setup_env_fail
SchedulerType=sched/backfill
JobRequeue=1
KillWait=20
ReturnToService=2
SlurmdTimeout=60
InactiveLimit=0
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class SlurmCluster:
    """A running cluster; ``stop`` ends it."""

    folder: Path
    nodes: tuple[str, ...]

    @property
    def environment(self) -> dict[str, str]:
        """The environment in which SLURM's commands find it."""
        return os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *argv: str, limit_s: float = 60.0) -> str:
        """Output of one of SLURM's commands. Raises CalledProcessError."""
        done = subprocess.run(
            argv, env=self.environment, capture_output=True, text=True, timeout=limit_s, check=True, cwd=self.folder
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """State of a job, for example RUNNING; it is known for some minutes after its end."""
        fields = dict(part.split("=", 1) for part in self.run("scontrol", "show", "job", job).split() if "=" in part)
        return fields["JobState"]

    def wait_for_state(self, job: str, *wanted: str, limit_s: float) -> str:
        """Wait until the job is in one of the states. Raises TimeoutError."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {limit_s:g} s, not {' or '.join(wanted)}")
            time.sleep(0.5)
        return state

    def stop(self) -> None:
        """Cancel all jobs and end every daemon."""
        with suppress(subprocess.SubprocessError):
            self.run("scancel", "--user=root", "--signal=KILL")
        for path in self.folder.glob("*.pid"):
            with suppress(ValueError, psutil.NoSuchProcess):
                daemon = psutil.Process(int(path.read_text()))
                family = [daemon, *daemon.children(recursive=True)]
                daemon.send_signal(signal.SIGTERM)
                for process in psutil.wait_procs(family, timeout=10)[1]:
                    process.kill()


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    return f"not installed: {', '.join(lacking)} (Debian's packages slurm-wlm and munge)" if lacking else None


def start_cluster(folder: Path, count: int, *, cpus: int = 2, gpus: int = 0) -> SlurmCluster:
    """Start ``count`` virtual nodes n1, n2, ..., all but the first with ``gpus`` GPUs that SLURM alone believes in.

    Raises TimeoutError, with the controller's log, when nodes stay away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "state").mkdir()
    host, ports = socket.gethostname().split(".")[0], _free_ports(count + 1)
    names = tuple(f"n{number + 1}" for number in range(count))
    # A weight, so that a job's component without GPUs is not planned on a node that another component needs.
    with_gpus = names[1:] if gpus else ()
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory=4000"
        + (f" Gres=gpu:{gpus} Weight=2" if name in with_gpus else "")
        for name, port in zip(names, ports[1:], strict=True)
    )
    for number in range(gpus):
        (folder / f"gpu{number}").touch()  # in place of a device: SLURM wants a file for each
    devices = f"Name=gpu Flags=nvidia_gpu_env File={folder}/gpu[0-{gpus - 1}]"
    (folder / "gres.conf").write_text("".join(f"NodeName={name} {devices}\n" for name in with_gpus))
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder, ports=ports, nodes=nodes))
    cluster = SlurmCluster(folder, names)
    _start_munge(folder)
    subprocess.run(["slurmctld", "-c"], env=cluster.environment, check=True, timeout=30)
    for name in names:
        subprocess.run(["slurmd", "-N", name], env=cluster.environment, check=True, timeout=30)
    _wait_until_idle(cluster)
    return cluster


@contextmanager
def cluster_or_skip(folder: Path, count: int, *, gpus: int = 0) -> Iterator[SlurmCluster]:
    """A cluster for as long as tests need it; they are skipped where there can be none."""
    install()
    if reason := missing():
        pytest.skip(reason)
    found = start_cluster(folder, count, gpus=gpus)
    try:
        yield found
    finally:
        found.stop()


def _start_munge(folder: Path) -> None:
    """An authentication daemon of our own, with a key and socket in ``folder``."""
    place = folder / "munge"
    place.mkdir(mode=0o700)
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o400)
    argv = ["munged", "--force", f"--key-file={place}/key", f"--socket={folder}/munge.socket"]
    argv += [f"--pid-file={folder}/munged.pid", f"--log-file={place}/munged.log", f"--seed-file={place}/seed"]
    subprocess.run(argv, check=True, timeout=30, stderr=subprocess.PIPE)


def _wait_until_idle(cluster: SlurmCluster) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        states = ""
        with suppress(subprocess.SubprocessError):
            states = cluster.run("sinfo", "--noheader", "--Node", "--format=%T")
            if states.split() == ["idle"] * len(cluster.nodes):
                return
        if time.monotonic() > deadline:
            log = (cluster.folder / "slurmctld.log").read_text()[-2000:]
            cluster.stop()
            raise TimeoutError(f"the nodes are {states.split()}, not idle; the controller's log:\n{log}")
        time.sleep(0.3)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def install() -> None:
    """Install Debian's packages where this may be done; otherwise ``missing`` goes on to say what is not there."""
    if os.geteuid() == 0 and shutil.which("apt-get") and any(shutil.which(name) is None for name in PROGRAMS):
        with suppress(subprocess.SubprocessError):
            for argv in (["update"], ["install", "--yes", "--no-install-recommends", "slurm-wlm", "munge"]):
                subprocess.run(["apt-get", "-qq", *argv], check=True, capture_output=True, timeout=300)
