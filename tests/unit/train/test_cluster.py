"""Places, commands and keys of a run's processes in a SLURM job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_opd.config import ClusterConfig, Config, load_config
from megatron_opd.engines.command import resolve_device
from megatron_opd.engines.connect import key_of
from megatron_opd.errors import ConfigError
from megatron_opd.runtime.rundir import Endpoints, RunDirectory
from megatron_opd.runtime.slurm import Allocation, Node
from megatron_opd.train.cluster import ONE_MACHINE, Cluster, demands, find_cluster
from megatron_opd.train.placement import Place, place
from megatron_opd.train.preflight import server_mistakes
from megatron_opd.train.roles import Role, assign_endpoints, on_nodes, own_roles
from megatron_opd.train.supervisor import dry_run

CONF = Path(__file__).resolve().parents[3] / "conf"
GPU_NODE = Node("g1", "10.0.0.1", 96, 8)


def settings(name: str, *changes: str) -> Config:
    return load_config(CONF / name, list(changes))


@pytest.mark.parametrize(("name", "nodes"), [("single_teacher", 3), ("multi_teacher", 4), ("strong_to_weak", 4)])
def test_the_paper_s_settings_fill_the_nodes_that_their_scripts_name(name: str, nodes: int) -> None:
    wanted = demands(settings(f"{name}.yaml"), on_gpus=True)
    eight = [Node(f"g{number}", f"10.0.0.{number}", 96, 8) for number in range(nodes)]
    place(wanted, eight)
    with pytest.raises(ConfigError, match="does not fit"):
        place(wanted, eight[1:])
    script = (CONF.parent / "launch" / f"train_{name}.sh").read_text()
    assert f"--nodes={nodes} --gpus-per-node=8" in script


@pytest.mark.parametrize("script", sorted((CONF.parent / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_launch_scripts_are_short_and_hold_no_logic(script: Path) -> None:
    lines = script.read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert len(lines) <= 40
    assert [line.split()[0] for line in commands] == ["set", "cd", "exec"]


def test_servers_that_run_already_need_no_place() -> None:
    roles = [
        one.role for one in demands(settings("toy.yaml", "rollout.server.urls=[http://10.0.0.9:1]"), on_gpus=False)
    ]
    assert roles == ["student", "teacher-math", "teacher-code"]


def test_on_one_machine_commands_stay_as_they_are() -> None:
    role = Role("rollout", ["python", "x"], {}, None)
    assert on_nodes([role], ONE_MACHINE, "key") == [role]
    assert assign_endpoints(settings("toy.yaml")).coordinator.startswith("http://127.0.0.1:")


def in_job(**options: object) -> Cluster:
    places = {"rollout": Place((GPU_NODE,), (2, 3)), "coordinator": Place((GPU_NODE,), ())}
    student = Place((replace(GPU_NODE, name="g2"), replace(GPU_NODE, name="g3")), (0, 1))
    return Cluster(ClusterConfig(**options), Allocation("7", (GPU_NODE,)), places | {"student": student})


def test_srun_starts_one_process_on_each_node_and_names_its_gpus() -> None:
    argv = in_job(srun=["--cpu-bind=none"]).command("student", ["python", "x"], None)
    assert argv[0] == "srun"
    assert {"--overlap", "--nodes=2", "--ntasks=2", "--nodelist=g2,g3", "--cpu-bind=none"} <= set(argv)
    assert argv[-4:] == ["env", "CUDA_VISIBLE_DEVICES=0,1", "python", "x"]


def test_containers_are_those_of_the_cluster_s_tool() -> None:
    pyxis = in_job(container_tool="pyxis", container_mounts=["/a:/a"]).command("rollout", ["x"], "image")
    assert {"--container-image=image", "--container-mounts=/a:/a", f"--container-workdir={Path.cwd()}"} <= set(pyxis)
    apptainer = in_job(container_tool="apptainer", container_mounts=["/a:/a"]).command("rollout", ["x"], "image.sif")
    inner = apptainer[apptainer.index("apptainer") :]
    assert inner[:8] == ["apptainer", "exec", "--nv", "--pwd", str(Path.cwd()), "--bind", "/a:/a", "image.sif"]


def test_coordinator_and_ranks_take_the_python_of_the_trainer_s_image(tmp_path: Path) -> None:
    config, cluster = settings("toy.yaml"), in_job(trainer_python="/opt/python", container_tool="apptainer")
    endpoints = Endpoints("http://10.0.0.1:1", ["http://10.0.0.1:2"], {}, [], "10.0.0.2", 3)
    roles = own_roles(RunDirectory(tmp_path), config, endpoints, "the-key", cluster)
    assert [role.argv[:2] for role in roles] == [["/opt/python", "-m"]] * 2


def test_engines_get_the_device_of_the_job_not_of_the_node_that_starts_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_opd.engines.command.gpu_present", lambda: False)  # a coordinator's node without GPUs
    config = settings("toy.yaml")
    assert resolve_device(config.engine.device) == "cpu"
    assert in_job().resolved(config).engine.device == "cuda"
    assert in_job().resolved(settings("toy.yaml", "engine.device=cpu")).engine.device == "cpu"
    assert ONE_MACHINE.resolved(config) is config


@pytest.mark.parametrize("name", ["single_teacher", "multi_teacher", "strong_to_weak"])
def test_in_a_job_replicas_need_no_gpus_of_their_own_and_an_image_brings_its_python(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_opd.engines.command.gpu_present", lambda: True)
    config = settings(f"{name}.yaml", "engine.python=/nowhere/python", "cluster.engine_image=engine.sif")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    told = " ".join(map(str, server_mistakes(config)))
    assert "share the same GPUs" in told and "/nowhere/python" in told
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert list(server_mistakes(config)) == []


def test_a_component_of_a_heterogeneous_job_is_named() -> None:
    node = replace(GPU_NODE, het_group=1)
    cluster = replace(in_job(), places={"rollout": Place((node,), (0,))})
    assert "--het-group=1" in cluster.command("rollout", ["x"], None)


def test_servers_off_loopback_get_the_token_in_their_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    [role] = on_nodes([Role("rollout", ["x"], {}, None)], in_job(), "the-key")
    assert not any("the-key" in part for part in role.argv)
    monkeypatch.delenv("OPD_ENGINE_KEY", raising=False)
    assert key_of(settings("toy.yaml").rollout.server) is None
    for name, value in role.environment.items():
        monkeypatch.setenv(name, value)
    assert key_of(settings("toy.yaml").rollout.server) == "the-key"
    attached = settings("toy.yaml", "rollout.server.urls=[http://10.0.0.9:1]").rollout.server
    assert key_of(attached) is None  # a token of ours is not for other people's servers


def test_outside_a_job_slurm_cannot_be_asked_for() -> None:
    with pytest.raises(ConfigError, match="no SLURM job"):
        find_cluster(settings("toy.yaml", "cluster.launcher=slurm"), {})
    assert find_cluster(settings("toy.yaml"), {}) is ONE_MACHINE
    assert find_cluster(settings("toy.yaml", "cluster.launcher=local"), {"SLURM_JOB_ID": "7"}) is ONE_MACHINE


def test_a_dry_run_tells_facts_places_and_commands_and_starts_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(CONF.parent)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    nodes = tuple(Node(f"n{number}", "127.0.0.1", 2, 0) for number in (1, 2, 3))
    monkeypatch.setattr("megatron_opd.train.cluster.read_allocation", lambda _: Allocation("7", nodes))
    lines = dry_run(settings("toy.yaml", f"output={tmp_path}"))
    assert "  steps     40 of 32 prompts x 4 rollouts = 128, up to 80 tokens each" in lines
    assert "  student          n1 (127.0.0.1)" in lines and "  teacher-code     n3 (127.0.0.1)" in lines
    commands = {lines[number][2:]: lines[number + 1] for number, line in enumerate(lines) if line.startswith("# ")}
    assert list(commands) == ["rollout", "teacher-math", "teacher-code", "coordinator", "student"]
    assert all(command.startswith("srun --overlap ") for command in commands.values())
    assert "--nodelist=n2" in commands["rollout"] and "megatron_opd.student worker 2" in commands["student"]
    assert not any(tmp_path.iterdir())


def test_gpus_and_half_given_containers_are_refused_in_a_job_all_at_once() -> None:
    changes = ["rollout.server.gpus='0'", "cluster.trainer_image=x", "rollout.colocate=true", "refresh.mode=disk"]
    with pytest.raises(ConfigError) as raised:
        find_cluster(settings("toy.yaml", *changes), {"SLURM_JOB_ID": "7"})
    assert "gpus of rollout" in str(raised.value) and "container_tool" in str(raised.value)
    assert "GPUs of their own in a SLURM job" in str(raised.value)
