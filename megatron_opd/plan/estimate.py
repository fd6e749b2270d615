"""The plan of a config: memory, work and time of every role, and which of them decides."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from megatron_opd.config import Config, ServerConfig
from megatron_opd.errors import ConfigError
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.hardware import Gpu
from megatron_opd.plan.memory import StageMemory, checkpoint_bytes, host_bytes, stage_memory
from megatron_opd.plan.serving import Replica
from megatron_opd.plan.shape import ModelShape, read_shape
from megatron_opd.plan.training import TrainingTime, refresh_seconds, training_time
from megatron_opd.plan.work import (
    REFERENCE,
    Operations,
    Setting,
    Step,
    largest_row,
    operations_of,
    rows_of,
    scoring_flops,
    step_of,
)
from megatron_opd.student.sizes import check_sizes, read_hf_config

GIB = 2**30


@dataclass(frozen=True)
class Models:
    """What is known of the config's models."""

    student: ModelShape
    student_config: dict[str, Any]  # config.json
    frozen: dict[str, ModelShape]  # by role: "teacher math" and so on, and "reference"


@dataclass(frozen=True)
class StudentPlan:
    """The student under one layout."""

    stages: list[StageMemory]
    usable: float  # bytes of a GPU
    host: float  # bytes of the fullest node's main memory, for a checkpoint
    checkpoint: float  # bytes on disk
    micro_batches: int  # of one copy
    time: TrainingTime

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank."""
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is enough."""
        return self.peak <= self.usable


@dataclass(frozen=True)
class ServerPlan:
    """The servers of one role."""

    role: str
    model: str
    gpus: int
    replicas: int
    weights: float  # bytes on each GPU
    cache: float  # bytes on each GPU
    cache_tokens: float  # of one replica
    together: float  # sequences at once in one replica
    scoring: float  # bytes on each GPU, of logits; 0 where nothing is scored
    seconds: float
    problems: list[str]


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of each stage of a step."""

    generate: float
    score: float
    train: float
    refresh: float

    @property
    def sequential(self) -> float:
        """Of a step whose stages follow one another."""
        return sum(asdict(self).values())

    @property
    def overlapped(self) -> float:
        """Of a step if all roles always had work: the slowest role's, the refresh included where it takes part."""
        return max(self.generate + self.refresh, self.score, self.train + self.refresh)

    @property
    def bottleneck(self) -> str:
        """The stage that takes longest."""
        return max(asdict(self).items(), key=lambda stage: stage[1])[0]


@dataclass(frozen=True)
class Plan:
    """Everything about one config on one kind of GPU."""

    setting: Setting
    models: Models
    operations: Operations
    student: StudentPlan
    rollout: ServerPlan
    frozen: list[ServerPlan]
    refresh_seconds: float
    notes: list[str] = field(default_factory=list)

    @property
    def gpus(self) -> int:
        """All GPUs."""
        return self.setting.config.world_size + self.rollout.gpus + sum(server.gpus for server in self.frozen)

    @property
    def time(self) -> StepTime:
        """Seconds of a step."""
        return step_time(self.student, self.rollout, self.frozen, self.refresh_seconds)

    @property
    def problems(self) -> list[str]:
        """Why the config does not fit, a sentence each."""
        found = [problem for server in [self.rollout, *self.frozen] for problem in server.problems]
        if not self.student.fits:
            found.insert(0, f"student: a rank needs {gib(self.student.peak)} of {gib(self.student.usable)} GiB")
        return found


def read_models(config: Config) -> Models:
    """Sizes of all models. Raises ModelError for a folder without config.json."""
    frozen = {f"teacher {domain}": (f"teachers.{domain}.model", each) for domain, each in config.teachers.items()}
    frozen |= {REFERENCE: ("reference.model", config.reference)} if config.reference else {}
    student = read_shape(config.student.model, "student.model")
    shapes = {role: read_shape(each.model, key) for role, (key, each) in frozen.items()}
    return Models(student, read_hf_config(config.student.model), shapes)


def make_setting(config: Config, gpu: Gpu, assumed: Assumptions) -> Setting:
    """Put numbers in place of what the assumptions leave to the config."""
    resolved = assumed.resolved(config)
    return Setting(config, gpu, resolved, step_of(config, resolved))


def make_plan(setting: Setting, models: Models) -> Plan:
    """Plan a config as it is. Raises OpdError for sizes that cannot be split."""
    config = setting.config
    check_sizes(config, models.student_config)
    return Plan(
        setting=setting,
        models=models,
        operations=operations_of(config, setting.step, models.student, models.frozen),
        student=plan_student(setting, models.student),
        rollout=plan_rollout(setting, models.student),
        frozen=plan_frozen(setting, models),
        refresh_seconds=refresh_seconds(models.student.sent_by(config.student), config.student.dtype, setting.assumed),
        notes=list(_notes(config, setting.step, models.student)),
    )


def step_time(student: StudentPlan, rollout: ServerPlan, frozen: list[ServerPlan], refresh: float) -> StepTime:
    """Teachers work side by side, so the slowest counts."""
    return StepTime(rollout.seconds, max(server.seconds for server in frozen), student.time.total, refresh)


def plan_student(setting: Setting, shape: ModelShape) -> StudentPlan:
    """Memory and time of the student under the layout of ``setting``."""
    config, assumed = setting.config, setting.assumed
    rows, _ = rows_of(setting)
    mine = -(-rows // config.student.data_parallel)
    row = largest_row(setting)
    return StudentPlan(
        stages=[stage_memory(config, shape, stage, row, mine) for stage in range(config.student.pipeline_parallel)],
        usable=setting.gpu.memory * assumed.memory_share,
        host=host_bytes(config, shape, assumed.gpus_per_node) if config.checkpoint.async_save else 0.0,
        checkpoint=checkpoint_bytes(config, shape),
        micro_batches=mine,
        time=training_time(setting, shape),
    )


def plan_rollout(setting: Setting, shape: ModelShape) -> ServerPlan:
    """The engines that sample."""
    step, server = setting.step, setting.config.rollout.server
    replica = Replica(shape, server.tensor_parallel, setting.config.engine, setting.gpu, setting.assumed)
    gpus, replicas = _replicas("rollout_gpus", setting.assumed.rollout_gpus, server)
    sequences = step.rollouts / replicas
    prompts = step.groups * (2 * step.prompt * shape.body_params + shape.tower_flops(step.images)) / replicas
    return ServerPlan(
        role="rollout",
        model=shape.name,
        gpus=gpus,
        replicas=replicas,
        weights=replica.weights,
        cache=replica.kv_memory,
        cache_tokens=replica.kv_tokens,
        together=replica.concurrency(sequences, step.prompt + step.lengths.mean_age),
        scoring=0.0,
        seconds=replica.prefill_seconds(prompts) + replica.sampling_seconds(sequences, step.prompt, step.lengths),
        problems=_server_problems("rollout", replica, step),
    )


def plan_frozen(setting: Setting, models: Models) -> list[ServerPlan]:
    """Teachers, each with an equal share of the rollouts, and the reference, which scores all."""
    config = setting.config
    servers = {f"teacher {domain}": teacher.server for domain, teacher in config.teachers.items()}
    servers |= {REFERENCE: config.reference.server} if config.reference else {}
    shares = {role: 1.0 if role == REFERENCE else 1 / len(config.teachers) for role in servers}
    return [plan_scorer(setting, role, servers[role], models.frozen[role], shares[role]) for role in servers]


def plan_scorer(setting: Setting, role: str, server: ServerConfig, shape: ModelShape, share: float) -> ServerPlan:
    """The servers of a frozen model that scores ``share`` of the rollouts."""
    step, engine = setting.step, setting.config.engine
    replica = Replica(shape, server.tensor_parallel, engine, setting.gpu, setting.assumed)
    gpus, replicas = _replicas("teacher_gpus", setting.assumed.teacher_gpus, server)
    problems = _server_problems(role, replica, step)
    outside = setting.gpu.memory * (1 - engine.memory_fraction)
    if replica.scoring_memory > outside:
        problems.append(
            f"{role}: logits of {gib(replica.scoring_memory)} GiB while scoring, {gib(outside)} GiB outside "
            f"engine.memory_fraction {engine.memory_fraction:g}"
        )
    return ServerPlan(
        role=role,
        model=shape.name,
        gpus=gpus,
        replicas=replicas,
        weights=replica.weights,
        cache=replica.kv_memory,
        cache_tokens=replica.kv_tokens,
        together=replica.concurrency(step.scored * share / replicas, step.sequence),
        scoring=replica.scoring_memory,
        seconds=replica.prefill_seconds(scoring_flops(shape, step, share) / replicas),
        problems=problems,
    )


def gib(size: float) -> str:
    """Bytes as GiB for a person."""
    return f"{size / GIB:,.1f}" if size >= GIB else f"{size / GIB:.3f}"


def _replicas(name: str, wanted: int | None, server: ServerConfig) -> tuple[int, int]:
    """GPUs of a role and its replicas. Raises ConfigError for a part of a replica."""
    gpus = wanted or server.tensor_parallel * server.count
    if gpus % server.tensor_parallel:
        raise ConfigError(
            "A replica cannot be split over roles",
            where=f"--assume {name}",
            got=gpus,
            expected=f"a multiple of the server's tensor_parallel = {server.tensor_parallel}",
        )
    return gpus, gpus // server.tensor_parallel


def _server_problems(role: str, replica: Replica, step: Step) -> list[str]:
    """Why a server cannot start, or cannot take the longest sequence."""
    room = replica.gpu.memory * replica.engine.memory_fraction
    if replica.weights > room:
        return [f"{role}: weights of {gib(replica.weights)} GiB on each GPU, {gib(room)} GiB for weights and cache"]
    if replica.kv_tokens < step.longest:
        return [f"{role}: the cache holds {replica.kv_tokens:,.0f} tokens, the longest sequence is {step.longest:,.0f}"]
    return []


def _notes(config: Config, step: Step, shape: ModelShape) -> Iterator[str]:
    """What a reader of the plan may not expect."""
    student = config.student
    if step.longest > student.row_tokens:
        yield (
            f"a sequence of {step.longest:,.0f} tokens, prompt and response at their longest, makes a row of its own: "
            f"memory is planned for it, not for student.row_tokens = {student.row_tokens:,}"
        )
    if "float32" in (student.dtype, config.engine.dtype):
        yield "float32 (student.dtype, engine.dtype) does not use the fast units of a GPU; bfloat16 does"
    if student.fp8 is not None:
        yield "student.fp8 is planned as bfloat16: neither its speed nor its copies of weights are modelled"
    if shape.tower_params:
        yield (
            f"{step.images:,.0f} tokens of a prompt are taken to stand for images (--assume image_share); every rank "
            "of the first pipeline stage has the whole vision tower, whose attention is left out of the operations"
        )
    if shape.tower_params and student.train_vision:
        yield "student.train_vision: what the vision tower keeps for its backward pass is not in the memory"
    if student.recompute == "selective" and student.device != "cpu":
        yield "flash attention keeps next to nothing: student.recompute selective costs time and frees little"
