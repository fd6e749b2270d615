"""A heterogeneous job on a real SLURM cluster: the coordinator's node has no GPU, the others have, and containers.

The GPUs are files that SLURM deals out as if they were GPUs, so everything computes on CPUs. In place of Apptainer a
script notes how it was called, and on which node, and starts the command without a container.
"""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, cluster_or_skip
from slurm_jobs import LIMIT_S, submit

from runs import ROOT, Servers

GPUS = 3  # of each of the three nodes that have any
HETEROGENEOUS = ("--nodes=1", "--exclusive", ":", "--nodes=3", "--exclusive", f"--gpus-per-node={GPUS}")
ON_CPU = ["student.device=cpu", "engine.device=cpu", "student.data_parallel=2"]  # four ranks, two on each node
APPTAINER = """\
#!/bin/sh
echo "$SLURMD_NODENAME: $*" >> "{calls}"
shift
while true; do case "$1" in --nv) shift;; --*) shift 2;; *) break;; esac; done
shift
exec "$@"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with cluster_or_skip(tmp_path_factory.mktemp("slurm") / "cluster", 4, gpus=GPUS) as found:
        yield found


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_roles_get_gpus_nodes_and_containers(
    cluster: SlurmCluster, tmp_path: Path, servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    script(tmp_path / "apptainer", APPTAINER.format(calls=tmp_path / "calls"))
    monkeypatch.setenv("PATH", f"{tmp_path}:" + cluster.environment["PATH"])
    python = script(tmp_path / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    attached = [item for item in servers.attach() if "code" not in item]
    containers = ["container_tool=apptainer", "trainer_image=trainer.sif", "engine_image=engine.sif"]
    containers += [f"trainer_python={python}", "container_mounts=[/models:/models]"]
    settings = [*attached, *ON_CPU, *(f"cluster.{item}" for item in containers)]
    sizes = ["steps=2", "rollout.prompts_per_step=8", "data.eval=null"]
    job = submit(cluster, tmp_path, "boxed", *settings, *sizes, ask=HETEROGENEOUS)
    ended = cluster.wait_for_state(job.number, "COMPLETED", "FAILED", limit_s=LIMIT_S)
    assert ended == "COMPLETED" and job.steps() == [1, 2], job.output.read_text()
    calls = (tmp_path / "calls").read_text()
    options = f"exec --nv --pwd {ROOT} --bind /models:/models"
    assert f"n1: {options} trainer.sif {python} -m megatron_opd.coordinator {job.folder}" in calls
    for node in ("n2", "n3"):
        expected = (
            f"{node}: {options} trainer.sif env CUDA_VISIBLE_DEVICES=0,1 {python} -m megatron_opd.student worker 4"
        )
        assert expected in calls
    assert f"n2: {options} engine.sif env CUDA_VISIBLE_DEVICES=2 " in calls  # the one server that was not attached
    assert calls.count(" exec ") == 4


def test_doctor_asks_every_node_of_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        argv = [".venv/bin/megatron-opd", "doctor", "conf/toy.yaml", "--json", f"output={tmp_path / 'runs'}", *ON_CPU]
        command = " ".join([*argv, f"teachers.code.server.port={port}"])
        output = tmp_path / "doctor.json"
        asked = ["sbatch", "--parsable", f"--output={output}", f"--error={tmp_path}/errors", *HETEROGENEOUS]
        body = script(tmp_path / "job.sh", f"#!/bin/sh\ncd {ROOT} && {command}\n")
        done = subprocess.run(
            [*asked, str(body)], env=cluster.environment, check=True, capture_output=True, text=True, timeout=60
        )
        assert cluster.wait_for_state(done.stdout.strip(), "COMPLETED", "FAILED", limit_s=LIMIT_S) == "FAILED"
    found = [(one["check"], one["state"], one["found"]) for one in json.loads(output.read_text())["checks"]]
    failed = {text for check, state, text in found if state == "failed"}
    dealt = "SLURM deals out 3 GPUs, nvidia-smi shows 0"  # true: they are files
    assert failed == {
        f"n2: {dealt}",
        f"n3: {dealt}",
        f"n4: {dealt}",
        f"n4: port of teacher-code {port}: The port cannot be used",
    }
    told = {check: text for check, state, text in found if state == "ok"}
    assert re.fullmatch(r"4 ranks on 2 nodes, gloo: 16\.8 MB in \d+ ms", told["all-reduce"])
    assert "student: n2 (127.0.0.1), n3 (127.0.0.1), GPUs 0,1" in told["placement"]
    assert "coordinator: n1 (127.0.0.1)" in told["placement"]
