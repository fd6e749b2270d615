"""What is read out of SLURM's answers."""

from __future__ import annotations

import pytest

from megatron_opd.errors import ProcessError
from megatron_opd.runtime.slurm import dealt_gpus, expand_counts, in_allocation, name_and_address, read_allocation


def test_counts_of_nodes_are_written_out() -> None:
    assert expand_counts("2(x3),1,16(x2)") == [2, 2, 2, 1, 16, 16]
    assert expand_counts("1") == [1]


def test_name_and_address_come_out_of_a_line() -> None:
    line = "NodeName=n1 Arch=x86_64 Gres=gpu:8 NodeAddr=10.1.2.3 OS=Linux 6.1 #1 SMP State=MIXED"
    assert name_and_address(line) == ("n1", "10.1.2.3")


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [("gpu:2(IDX:0-1)", 2), ("gpu:h100:8(IDX:0-7)", 8), ("gpu:a100:3(IDX:0-1,3),shard:2(IDX:0)", 3), ("", 0)],
)
def test_gpus_of_each_node_come_out_of_a_job_s_details(gres: str, gpus: int) -> None:
    parts = ["JobId=7 NodeList=n[1-3] JOB_GRES=gpu:9  ", "Nodes=n1 CPU_IDs=0 Mem=0 GRES= "]
    parts += [f"Nodes=n[2-3] CPU_IDs=0-7,9 Mem=0 GRES={gres} MinCPUsNode=1 TresPerNode=gres:gpu:2"]
    line = " ".join(parts)
    assert dealt_gpus(line) == [("n1", 0), ("n[2-3]", gpus)]


def test_outside_a_job_there_is_no_allocation() -> None:
    assert not in_allocation({"PATH": "/bin"})
    assert in_allocation({"SLURM_JOB_ID": "7"})


def test_an_absent_slurm_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_CPUS_PER_NODE": "2(x2)"}
    with pytest.raises(ProcessError, match="cannot be asked"):
        read_allocation(job)
