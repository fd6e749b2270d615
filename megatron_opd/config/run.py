"""The config of one run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from megatron_opd.config.base import PositiveInt, Section
from megatron_opd.config.cluster import ClusterConfig
from megatron_opd.config.recipe import BalanceConfig, CalibrationConfig, DifficultyConfig, LossConfig, ObjectiveConfig
from megatron_opd.config.sections import (
    CheckpointConfig,
    CoordinatorConfig,
    DataConfig,
    EvalConfig,
    OptimizerConfig,
    RecordConfig,
    RefreshConfig,
    RolloutConfig,
    ScoringConfig,
    SinksConfig,
    StudentConfig,
    TeacherConfig,
    VerifierConfig,
)
from megatron_opd.config.servers import EngineConfig, ServerConfig


class Config(Section):
    """One run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run and of its folder."""
    output: Path = Path("runs")
    """Folder that holds the runs."""
    existing: Literal["refuse", "archive", "resume"] = "refuse"
    """What to do with a folder of the same name: refuse, move it aside under its time, or go on where it stopped."""
    steps: PositiveInt
    """Optimizer steps."""
    max_generated_tokens: PositiveInt | None = None
    """The run ends with the step in which its training rollouts reach this many tokens; null: only steps count."""
    seed: int = 0
    """Seed of prompt order, sampling and initial state."""
    student: StudentConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    teachers: Annotated[dict[str, TeacherConfig], Field(min_length=1)]
    """Domain to teacher; null takes out one that another file names."""
    reference: TeacherConfig | None = None
    """The free reference of objective.teacher_scale, frozen, for all domains; null: none."""
    data: DataConfig
    loss: LossConfig = LossConfig()
    balance: BalanceConfig | None = None
    """Online balancing; null trains on every rollout."""
    calibration: CalibrationConfig | None = None
    """Margin calibration; null leaves the teacher's advantage as it is."""
    objective: ObjectiveConfig = ObjectiveConfig()
    difficulty: DifficultyConfig = DifficultyConfig()
    verifiers: VerifierConfig = VerifierConfig()
    scoring: ScoringConfig = ScoringConfig()
    refresh: RefreshConfig = RefreshConfig()
    evaluation: EvalConfig = EvalConfig()
    record: RecordConfig = RecordConfig()
    sinks: SinksConfig = SinksConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()
    cluster: ClusterConfig = ClusterConfig()

    @field_validator("teachers", mode="before")
    @classmethod
    def _without_null(cls, teachers: object) -> object:
        named = isinstance(teachers, dict)
        return {name: teacher for name, teacher in teachers.items() if teacher is not None} if named else teachers

    @model_validator(mode="after")
    def _parts_fit(self) -> Config:
        mistakes = list(self._misfits())
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    def _misfits(self) -> Iterator[str]:
        """What is wrong between sections, a clause each."""
        objective = self.objective
        if self.data.mixture is not None and set(self.data.mixture) != set(self.teachers):
            yield f"data.mixture must name each domain of teachers ({', '.join(sorted(self.teachers))}) and no other"
        for domain in sorted(set(self.teachers) - set(self.verifiers.kinds)):
            yield f"teachers.{domain} has no verifier: set verifiers.kinds.{domain}"
        for domain in sorted(set(objective.domain_weights) - set(self.teachers)):
            yield f"objective.domain_weights.{domain} names no teacher"
        if (objective.teacher_scale != 1) != (self.reference is not None):
            yield "objective.teacher_scale other than 1 needs reference, and reference is of use to nothing else"
        if objective.forward_kl > 0 and self.scoring.top_k == 0:
            yield "objective.forward_kl needs the teacher's top-k rows: set scoring.top_k"
        highest = math.log(self.scoring.top_k + 1)  # entropy of k tokens and one bucket for the rest
        if objective.forward_kl > 0 and self.scoring.top_k > 0 and objective.forward_kl_entropy >= highest:
            yield (
                f"objective.forward_kl_entropy {objective.forward_kl_entropy:g} is never exceeded: "
                f"{self.scoring.top_k} top-k tokens have an entropy of at most {highest:.3f}"
            )
        if self.rollout.max_staleness > 0 and self.refresh.pause == "none":
            yield "rollout.max_staleness refreshes weights amid responses: set refresh.pause to retract or in_place"
        if objective.placebo and self.calibration is None:
            yield "objective.placebo permutes the outcomes of calibration, which is null"
        if self.evaluation.every_steps > 0 and self.data.eval is None:
            yield "evaluation.every_steps evaluates on data.eval, which is null"
        yield from self._server_misfits()

    def _server_misfits(self) -> Iterator[str]:
        if self.rollout.server.engine != "sglang":
            yield "rollout.server.engine must be sglang, the only one whose weights are refreshed"
        for key, server in self.frozen_servers.items():
            if server.engine == "vllm" and self.engine.deterministic:
                yield f"engine.deterministic is a mode of SGLang, and {key}.engine is vllm"

    @property
    def frozen_servers(self) -> dict[str, ServerConfig]:
        """Servers of the models that do not learn, by their key."""
        servers = {f"teachers.{domain}.server": teacher.server for domain, teacher in self.teachers.items()}
        return servers | ({"reference.server": self.reference.server} if self.reference else {})

    @property
    def run_dir(self) -> Path:
        """Folder of this run."""
        return self.output / self.name

    @property
    def images_folder(self) -> Path:
        """Folder of resized images (``runtime.vision.image_file``), which runs share."""
        return self.data.images.folder or self.output / ".images"

    @property
    def sampling_seed(self) -> int | None:
        """Seed of all responses; None where servers would not heed it."""
        return self.seed if self.engine.deterministic else None

    @property
    def world_size(self) -> int:
        """Ranks of the student."""
        return self.student.ranks
