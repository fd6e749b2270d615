"""The options of Uni-OPD's recipe and of its relatives: what the pure functions of ``megatron_opd.recipe`` take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator

from megatron_opd.config.base import PositiveFloat, PositiveInt, Real, Section

Direction = Literal["lift", "drop", "spread", "balanced"]


class LossConfig(Section):
    """The clipped, importance-weighted policy gradient of on-policy distillation (Uni-OPD, arXiv 2605.03677)."""

    clip_low: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """The importance ratio has no effect below 1 - clip_low."""
    clip_high: Annotated[float, Field(ge=0)] = 0.28
    """The importance ratio has no effect above 1 + clip_high."""
    importance_cap: PositiveFloat = 2.0
    """Largest importance weight of a token that older weights drew (rollout.max_staleness); the clip is for others."""
    max_gap: PositiveFloat = 10.0
    """Tokens whose teacher and student log-probs differ by this much or more are masked."""
    normalize: Literal["sequence", "token"] = "sequence"
    """Mean over each sequence's tokens then over sequences, or mean over all tokens."""


class BalanceConfig(Section):
    """Online correctness-aware balancing: which rollouts of a step stay (``recipe.balance``).

    The band of a target ratio r and a tolerance t is r / (1 + t) <= correct / incorrect <= r * (1 + t). It is
    symmetric: exchanging the classes, and r with 1 / r, changes nothing. Source: Uni-OPD's "sample filter".
    """

    scope: Literal["group", "global"] = "group"
    """Where the ratio holds: in each prompt group, or only over the whole step."""
    ratio: Annotated[Real, Field(gt=0)] = 1.0
    """Target of correct : incorrect."""
    tolerance: Annotated[Real, Field(ge=0)] = 0.0
    """Relative half-width of the band in which nothing is dropped."""
    one_sided: Literal["keep", "subsample", "drop"] = "keep"
    """What happens to graded rollouts where only one class occurs."""
    one_sided_samples: Annotated[int, Strict(), Field(ge=1)] = 2
    """Rollouts that "subsample" leaves; 2 is what the most lopsided mixed group keeps at ratio 1."""
    unknown: Literal["keep", "drop"] = "keep"
    """What happens to ungraded rollouts; they count for neither class in any case."""
    order: Literal["before_scoring", "after_scoring"] = "before_scoring"
    """Before: what balancing drops is never scored. After: it is scored and counts in margins, but is not trained."""
    refill_rounds: Annotated[int, Field(ge=0)] = 0
    """How often a step may draw further prompts to make up for what balancing dropped; 0 lets it shrink."""


class CalibrationConfig(Section):
    """Outcome-guided margin calibration (``recipe.calibrate``; docs/calibration.md).

    A unit is one prompt's group (scope "group") or the whole batch (scope "global"). Source: Uni-OPD, equations 9 to 11
    of version 1 and appendix C of version 2; the authors' "correct_up", "incorrect_down" and "both" are "lift", "drop"
    and "spread". "hinge", "balanced", "sigma" and the cap are additions.
    """

    method: Literal["none", "shift", "mask", "mask_group"] = "shift"
    """Shift returns, remove the worst trajectories one by one, remove units below the margin, or only report."""
    margin: Literal["mean", "minmax", "hinge"] = "mean"
    """Of means, of the lowest correct and highest incorrect, or the latter moving only what is out of order."""
    scope: Literal["group", "global"] = "group"
    """What one unit is."""
    direction: Direction = "spread"
    """Who moves: the correct up, the incorrect down, both by half, or by shares that add to 0 (the smallest change)."""
    delta: Real = 0.0
    """Margin to reach, in delta_unit; negative tolerates some disorder."""
    delta_unit: Literal["absolute", "sigma"] = "absolute"
    """Nats per token, or standard deviations of the unit's graded returns before the shift."""
    max_shift: Annotated[Real, Field(ge=0)] | None = None
    """No offset is larger than this, nats per token; null sets no cap."""
    min_retain: Annotated[Real, Field(ge=0, le=1)] = 0.25
    """The mask keeps at least max(1, floor(min_retain * n)) of the n trajectories of either outcome."""

    @model_validator(mode="after")
    def _has_a_meaning(self) -> CalibrationConfig:
        pair = f"method {self.method} with margin {self.margin} and scope {self.scope}"
        if self.margin == "hinge" and self.method in ("mask", "mask_group"):
            raise ValueError(f"got {pair}: hinge is a way to shift; expected margin mean or minmax, or method shift")
        if self.scope == "global" and self.method == "mask_group":
            raise ValueError(f"got {pair}: the whole batch would be removed as one unit; expected scope group")
        return self


class ObjectiveConfig(Section):
    """Terms of the token advantage that other papers add to plain distillation; all off by default."""

    teacher_scale: Annotated[Real, Field(gt=0)] = 1.0
    """Lambda of ExOPD (arXiv 2602.12125): lambda log pi_T + (1 - lambda) log pi_ref - log pi; needs reference."""
    gap_floor: Real | None = None
    """Token gaps below this are raised to it (one-sided clip, after the gap mask); null leaves them."""
    gap_ceiling: Real | None = None
    """Token gaps above this are lowered to it; null leaves them."""
    domain_weights: dict[str, Annotated[Real, Field(ge=0)]] = {}
    """Factor on the advantages of a domain: the w_i of sum_i w_i KL_i; a domain that is not named has 1."""
    sign_filter: bool = False
    """Train only on trajectories whose return has the sign of their outcome (RA-OPD, arXiv 2608.27960)."""
    group_advantage: Annotated[Real, Field(ge=0)] = 0.0
    """Coefficient of GRPO's outcome advantage (arXiv 2402.03300), added to each trained token."""
    group_advantage_scaled: bool = True
    """Whether it is divided by the group's standard deviation; false is Dr. GRPO (arXiv 2503.20783)."""
    constant_reward: Annotated[Real, Field(ge=0)] = 0.0
    """Outcome reward of mixed groups that is the same whatever the teacher says: the control of calibration (P2)."""
    constant_direction: Direction = "spread"
    """Baseline of constant_reward, named as the directions of calibration."""
    placebo: bool = False
    """Calibrate on outcomes that were permuted within each group: what calibration does without information."""
    forward_kl: Annotated[Real, Field(ge=0)] = 0.0
    """Coefficient of the forward KL on the teacher's top-k tokens (EOPD, arXiv 2603.07079); needs scoring.top_k."""
    forward_kl_entropy: Annotated[Real, Field(ge=0)] = 0.0
    """The forward KL counts only where the teacher's entropy is above this, nats."""

    @model_validator(mode="after")
    def _clips_leave_something(self) -> ObjectiveConfig:
        if self.gap_floor is not None and self.gap_ceiling is not None and self.gap_floor >= self.gap_ceiling:
            raise ValueError(f"gap_floor {self.gap_floor} is not below gap_ceiling {self.gap_ceiling}")
        return self


class LazyConfig(Section):
    """Prompts drawn by pass rates that are learned from the training rollouts themselves, at no extra rollout.

    A prompt of pass rate p has the weight p^a (1 - p)^b, in expectation under its Beta posterior, so it is never 0.
    """

    prior: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    """Passes and failures that every prompt is taken to have had; 1 and 1 is the uniform prior."""
    power: tuple[Annotated[Real, Field(ge=0)], Annotated[Real, Field(ge=0)]] = (1.0, 1.0)
    """a and b of the weight (PACED, arXiv 2603.11178)."""
    start: Path | None = None
    """Pass counts to begin with: pass_rates.parquet of a run or of ``megatron-opd difficulty``; null: none."""


class DifficultyConfig(Section):
    """Offline difficulty: how often the student solves each training prompt (``megatron-opd difficulty``)."""

    samples: PositiveInt = 8
    """Responses for each prompt: N."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    """Nucleus that is sampled from."""
    top_k: PositiveInt | None = 50
    """Most likely tokens that are sampled from; null takes all."""
    level: Literal["largest", "ends"] = "largest"
    """Height to which the middle is raised: its own largest bin, or the mean of the ends that are not raised."""
    max_repeats: PositiveInt = 4
    """Most appearances of one prompt in an epoch."""
    concurrency: PositiveInt = 64
    """Prompts under way at once."""
    output: Path | None = None
    """Folder of the results; null: the run's folder name with .difficulty."""
