"""The section of the config about nodes: one machine, or the allocation of a SLURM job."""

from __future__ import annotations

from typing import Literal

from megatron_opd.config.base import Section


class ClusterConfig(Section):
    """Where the processes of a run go (docs/cluster.md)."""

    launcher: Literal["auto", "local", "slurm"] = "auto"
    """How processes are started: here, or with srun on the nodes of the job; auto takes srun inside a SLURM job."""
    srun: list[str] = []
    """Options that every srun gets, for what is particular to a cluster, for example ["--cpu-bind=none"]."""
    container_tool: Literal["pyxis", "apptainer"] | None = None
    """What runs processes in containers; null runs them without."""
    trainer_image: str | None = None
    """Image of coordinator and student; null runs them without a container."""
    engine_image: str | None = None
    """Image of the servers that the run starts; null runs them without a container."""
    container_mounts: list[str] = []
    """Folders that containers see, as OUTSIDE:INSIDE; that of this package must keep its path."""
    trainer_python: str | None = None
    """Python of coordinator and student, for example the trainer image's; null takes the one that runs this."""
    requeue: bool = True
    """Whether a job that is about to be stopped (SIGUSR1) goes back into the queue after it has saved."""
