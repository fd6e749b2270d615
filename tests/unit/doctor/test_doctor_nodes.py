"""What is said of nodes by what they tell; the real thing is in tests/flow/test_slurm_gpus.py."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_opd.config import ClusterConfig
from megatron_opd.doctor.nodes import check_nodes, judge
from megatron_opd.doctor.on_node import look
from megatron_opd.doctor.on_nodes import ask_nodes
from megatron_opd.errors import ProcessError
from megatron_opd.runtime.slurm import Allocation, Node
from megatron_opd.train.cluster import Cluster
from megatron_opd.train.placement import Place

NODES = (Node("n1", "10.0.0.1", 8, 0), Node("n2", "10.0.0.2", 8, 2))
H100 = ["H100", 81_559, 0, "570.1"]


def told(node: str, **changes: object) -> dict:
    good = {"missing": [], "taken": [], "gpus": [], "gpu_problem": "", "shared_memory": 1 << 40}
    return {"node": node, **good, **changes}


def found(**changes: object) -> list[tuple[str, str]]:
    answers = {"n1": told("n1"), "n2": told("n2", **{"gpus": [H100, H100], **changes})}
    return [(finding.state, finding.found) for finding in judge(NODES, answers)]


def test_good_nodes_are_one_line() -> None:
    expected = "2 answer, see the same files, have free ports; 2 x H100, driver 570.1"
    assert found() == [("ok", expected)]


@pytest.mark.parametrize(
    ("changes", "state", "text"),
    [
        ({"missing": ["/models/a"]}, "failed", "n2 cannot see /models/a"),
        ({"taken": ["refresh.port 4: in use"]}, "failed", "n2: refresh.port 4: in use"),
        ({"gpus": [H100], "gpu_problem": ""}, "failed", "n2: SLURM deals out 2 GPUs, nvidia-smi shows 1"),
        ({"gpus": [H100, ["H100", 81_559, 40_000, "570.1"]]}, "warning", "n2: 1 GPUs in use already, up to 40,000 MB"),
        ({"shared_memory": 64 << 20}, "warning", "n2: 67.1 MB free in /dev/shm"),
    ],
)
def test_what_is_wrong_is_told_of_its_node(changes: dict, state: str, text: str) -> None:
    assert found(**changes)[0] == (state, text)
    assert [one for one, _ in found(**changes)].count("ok") == (state == "warning")


def test_a_node_looks_for_files_and_its_own_ports(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        wanted = {"paths": [str(tmp_path), "/nowhere"], "ports": {"n1": [["refresh.port", port, "127.0.0.1"]]}}
        here, other = look(wanted, "n1"), look(wanted, "n2")
    assert here["missing"] == other["missing"] == ["/nowhere"]
    assert here["taken"] == [f"refresh.port {port}: The port cannot be used"] and other["taken"] == []


def test_a_node_that_does_not_answer_is_told_with_what_srun_said(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(ClusterConfig(), Allocation("7", NODES), {"doctor": Place(NODES, ())})
    script = ["sh", "-c", "echo doctor-found:1; echo srun: n2 is down >&2; exit 1"]
    monkeypatch.setattr(Cluster, "command", lambda *_: script)
    with pytest.raises(ProcessError, match="n1, n2") as raised:
        ask_nodes(cluster, "doctor", "any.module", [], 10)
    assert "1 of 2 nodes answered, exit code 1; srun: n2 is down" in str(raised.value)


def test_without_a_job_there_are_no_nodes_and_roles_without_room_are_told_once(settings, only, monkeypatch) -> None:
    assert "no SLURM job" in only(check_nodes(settings())).found
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr("megatron_opd.train.cluster.read_allocation", lambda _: Allocation("7", NODES[:1]))
    crowded = only(check_nodes(settings("student.data_parallel=16")))
    assert (crowded.state, crowded.found) == ("skipped", "the roles do not fit: see placement")
