"""Tokens and operations of one step, whatever they run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_opd.config import Config, StudentConfig
from megatron_opd.plan.activations import MicroBatch
from megatron_opd.plan.assumptions import Assumptions
from megatron_opd.plan.hardware import Gpu
from megatron_opd.plan.lengths import Lengths
from megatron_opd.plan.shape import ModelShape

REFERENCE = "reference"


@dataclass(frozen=True)
class Step:
    """What one optimizer step samples, scores and trains on."""

    groups: int
    rollouts: int
    kept: float  # rollouts that are scored and trained on
    scored: float  # rollouts that a teacher sees
    prompt: float  # mean tokens
    lengths: Lengths  # of responses
    longest: float  # tokens of the longest sequence that may come: prompt and response
    images: float  # mean tokens of a prompt that stand for images, for a model that reads them

    @property
    def sequence(self) -> float:
        """Mean tokens of prompt and response."""
        return self.prompt + self.lengths.mean

    @property
    def generated(self) -> float:
        """Tokens of all responses."""
        return self.rollouts * self.lengths.mean

    @property
    def trained(self) -> float:
        """Tokens that go through the student's training, prompts included: each sequence has its own."""
        return self.kept * self.sequence

    @property
    def scored_responses(self) -> float:
        """Tokens that teachers give a log-prob to."""
        return self.scored * self.lengths.mean

    @property
    def scored_tokens(self) -> float:
        """Tokens that teachers read: the prompt of a group is read once and then in their cache."""
        return self.groups * self.prompt + self.scored_responses


@dataclass(frozen=True)
class Setting:
    """What is planned, on what, and what is assumed of it."""

    config: Config
    gpu: Gpu
    assumed: Assumptions  # resolved
    step: Step

    def with_student(self, student: StudentConfig) -> Setting:
        """The same with another layout."""
        return replace(self, config=self.config.model_copy(update={"student": student}))


@dataclass(frozen=True)
class Operations:
    """Floating-point operations of one step."""

    generation: float
    teachers: float
    reference: float
    forward: float  # of training
    backward: float
    recompute: float

    @property
    def training(self) -> float:
        """Everything that the student's ranks do."""
        return self.forward + self.backward + self.recompute

    @property
    def total(self) -> float:
        """All of the step."""
        return self.generation + self.teachers + self.reference + self.training

    @property
    def teacher_share(self) -> float:
        """Share of teachers and reference."""
        return (self.teachers + self.reference) / self.total


def step_of(config: Config, assumed: Assumptions) -> Step:
    """The step of a config; ``assumed`` is resolved."""
    rollouts = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    prompt = assumed.prompt_tokens or 0.0
    kept = rollouts * assumed.kept_share
    scores_all = config.balance is not None and config.balance.order == "after_scoring"
    return Step(
        groups=config.rollout.prompts_per_step,
        rollouts=rollouts,
        kept=kept,
        scored=rollouts if scores_all else kept,
        prompt=prompt,
        lengths=Lengths(assumed.response_tokens or 0.0, assumed.longest_response or 0.0),
        longest=config.data.max_prompt_tokens + (assumed.longest_response or 0.0),
        images=prompt * assumed.image_share,
    )


def generation_flops(shape: ModelShape, step: Step) -> float:
    """Prompts, once for each group, and every sampled token."""
    matrices = step.groups * step.prompt * shape.body_params + step.generated * (shape.body_params + shape.head_params)
    prompts = step.groups * (shape.attention_flops(step.prompt**2) + shape.tower_flops(step.images))
    squares = step.rollouts * (step.lengths.mean_square(step.prompt) - step.prompt**2)
    return 2 * matrices + prompts + shape.attention_flops(squares)


def scoring_flops(shape: ModelShape, step: Step, share: float) -> float:
    """A teacher that scores ``share`` of the rollouts: the output matrix is needed for responses only."""
    matrices = step.scored_tokens * shape.body_params + step.scored_responses * shape.head_params
    squares = step.groups * step.prompt**2
    squares += step.scored * (step.lengths.mean_square(step.prompt) - step.prompt**2)
    images = step.groups * shape.tower_flops(step.images)
    return share * (2 * matrices + shape.attention_flops(squares) + images)


def training_flops(config: Config, step: Step, shape: ModelShape) -> tuple[float, float, float]:
    """Forward, backward, and what is computed again; without the vision tower."""
    head = 2 * step.trained * shape.head_params
    body = 2 * step.trained * shape.body_params
    attention = step.kept * shape.attention_flops(step.lengths.mean_square(step.prompt))
    again = {"none": 0.0, "selective": attention, "full": body + attention}[config.student.recompute]
    # The fused log-prob makes its logits again in any case.
    return head + body + attention, 2 * (head + body + attention), again + head


def tower_flops(config: Config, step: Step, shape: ModelShape) -> tuple[float, float]:
    """Forward and backward of the student's vision tower: every sequence has its own images."""
    forward = step.kept * shape.tower_flops(step.images)
    return forward, 2 * forward if config.student.train_vision else 0.0


def operations_of(config: Config, step: Step, student: ModelShape, frozen: dict[str, ModelShape]) -> Operations:
    """All operations; ``frozen``: shapes by role, teachers with equal shares of the rollouts, and "reference"."""
    teachers = {role: shape for role, shape in frozen.items() if role != REFERENCE}
    forward, backward, recompute = training_flops(config, step, student)
    tower_forward, tower_backward = tower_flops(config, step, student)
    return Operations(
        generation=generation_flops(student, step),
        teachers=sum(scoring_flops(shape, step, 1 / len(teachers)) for shape in teachers.values()),
        reference=scoring_flops(frozen[REFERENCE], step, 1.0) if REFERENCE in frozen else 0.0,
        forward=forward + tower_forward,
        backward=backward + tower_backward,
        recompute=recompute,
    )


def rows_of(setting: Setting) -> tuple[int, MicroBatch]:
    """Micro-batches of the step, over all copies of the student, and a mean one."""
    step = setting.step
    together = max(1, int(setting.config.student.row_tokens // step.sequence))
    rows = max(1, -(-round(step.kept) // together))
    each = step.kept / rows
    return rows, MicroBatch(
        each * step.sequence, each * step.lengths.mean_square(step.prompt), setting.assumed.expert_imbalance
    )


def largest_row(setting: Setting) -> MicroBatch:
    """The micro-batch that decides memory: a full row, or one sequence that is longer than a row."""
    longest = setting.step.longest
    tokens = max(setting.config.student.row_tokens, longest)
    return MicroBatch(tokens, longest * tokens, setting.assumed.expert_imbalance)
