"""Where the processes of a run go: this machine, or the nodes of a SLURM job, on which srun starts them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megatron_opd.config import ClusterConfig, Config, ServerConfig
from megatron_opd.errors import ConfigError, OpdError, raise_together
from megatron_opd.runtime.slurm import Allocation, in_allocation, read_allocation
from megatron_opd.train.placement import Demand, Place, place

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Cluster:
    """The places of all roles. On one machine there are none, and every address is loopback."""

    config: ClusterConfig
    allocation: Allocation | None
    places: Mapping[str, Place]

    def host(self, role: str) -> str:
        """Address at which other roles reach this one."""
        return self.places[role].address if self.allocation else LOOPBACK

    def resolved(self, config: Config) -> Config:
        """With the device of the job's servers, which the node that starts them may lack. Ranks look for themselves."""
        if config.engine.device != "auto" or not (self.allocation and any(node.gpus for node in self.allocation.nodes)):
            return config
        return config.model_copy(update={"engine": config.engine.model_copy(update={"device": "cuda"})})

    def nodes(self, role: str) -> int:
        """Nodes that the role spans."""
        return len(self.places[role].nodes) if self.allocation else 1

    def command(self, role: str, argv: list[str], image: str | None) -> list[str]:
        """The command that starts ``argv`` once on each node of the role; in a container where an image is given."""
        if self.allocation is None:
            return argv
        here = self.places[role]
        gpus = ",".join(map(str, here.gpus))
        # In the command, because SLURM sets the variable of a task by itself.
        visible = ["env", f"CUDA_VISIBLE_DEVICES={gpus}"] if gpus else []
        return [*self._srun(role, here, image), *self._apptainer(image), *visible, *argv]

    def _srun(self, role: str, here: Place, image: str | None) -> list[str]:
        count = len(here.nodes)
        argv = ["srun", "--overlap", f"--job-name={role}", f"--nodes={count}", f"--ntasks={count}"]
        argv += ["--ntasks-per-node=1", f"--nodelist={','.join(node.name for node in here.nodes)}"]
        argv += [f"--cpus-per-task={min(node.cpus for node in here.nodes)}", "--mem=0"]
        argv += ["--kill-on-bad-exit=1", "--unbuffered", "--export=ALL", "--input=none"]
        if here.nodes[0].het_group is not None:
            argv.append(f"--het-group={here.nodes[0].het_group}")
        if image and self.config.container_tool == "pyxis":
            mounts = ",".join(self.config.container_mounts)
            argv += [f"--container-image={image}", *([f"--container-mounts={mounts}"] if mounts else [])]
            argv.append(f"--container-workdir={Path.cwd()}")  # paths of the config may be relative
        return [*argv, *self.config.srun]

    def _apptainer(self, image: str | None) -> list[str]:
        if not image or self.config.container_tool != "apptainer":
            return []
        binds = [part for mount in self.config.container_mounts for part in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", "--pwd", str(Path.cwd()), *binds, image]


ONE_MACHINE = Cluster(ClusterConfig(), None, {})


def on_slurm(config: Config, environment: Mapping[str, str]) -> bool:
    """Whether a process with this environment is to start the run's processes with srun."""
    wanted = config.cluster.launcher
    return wanted == "slurm" or (wanted == "auto" and in_allocation(environment))


def find_cluster(config: Config, environment: Mapping[str, str]) -> Cluster:
    """One machine, or the job that a process with this environment runs in.

    Raises ConfigError when the roles do not fit, all of them at once; ProcessError when SLURM cannot be asked.
    """
    if not on_slurm(config, environment):
        return ONE_MACHINE
    if not in_allocation(environment):
        raise ConfigError(
            "There is no SLURM job",
            where="cluster.launcher",
            got="slurm, but SLURM_JOB_ID is not set",
            fix="start the run with sbatch launch/train_multi_teacher.sh, or set cluster.launcher=local",
        )
    raise_together(list(_mistakes(config)))
    allocation = read_allocation(environment)
    places = place(demands(config, on_gpus=any(node.gpus for node in allocation.nodes)), allocation.nodes)
    # Where the command runs: it costs no unit.
    return Cluster(config.cluster, allocation, places | {"coordinator": Place(allocation.nodes[:1], ())})


def servers_of(config: Config) -> dict[str, ServerConfig]:
    """Every kind of server by the name of its role."""
    found = {"rollout": config.rollout.server}
    found |= {f"teacher-{domain}": teacher.server for domain, teacher in config.teachers.items()}
    return found | ({"reference": config.reference.server} if config.reference else {})


def replica_names(role: str, server: ServerConfig) -> list[str]:
    """Names of its servers: the role's own, or with a number where there are several."""
    return [role] if server.count == 1 else [f"{role}-{number}" for number in range(server.count)]


def demands(config: Config, *, on_gpus: bool) -> list[Demand]:
    """What each process group needs; servers that run already need nothing."""
    student = config.student.ranks * (1 if on_gpus else config.student.threads_per_rank)
    found = [Demand("student", student, spans_nodes=True)]
    for role, server in servers_of(config).items():
        if not server.urls:
            found += [Demand(name, server.tensor_parallel) for name in replica_names(role, server)]
    return found


def _mistakes(config: Config) -> Iterator[OpdError]:
    for role, server in servers_of(config).items():
        if server.gpus is not None:
            yield ConfigError(
                "GPUs are dealt out by placement in a SLURM job",
                where=f"gpus of {role}",
                got=server.gpus,
                fix="leave it out, or set cluster.launcher=local on one machine",
            )
    if config.rollout.colocate:
        yield ConfigError(
            "Rollout engines get GPUs of their own in a SLURM job",
            where="rollout.colocate",
            got="true",
            fix="leave it out, or set cluster.launcher=local on one machine",
        )
    images = config.cluster.trainer_image or config.cluster.engine_image
    if bool(images) != (config.cluster.container_tool is not None):
        yield ConfigError(
            "An image needs a container tool, and a tool an image",
            where="cluster.container_tool",
            got=f"{config.cluster.container_tool}, images {images}",
            fix="set cluster.container_tool and cluster.trainer_image or cluster.engine_image",
        )
