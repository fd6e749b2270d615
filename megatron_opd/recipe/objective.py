"""One step's rollouts through the recipe: distillation gaps, calibration, outcome terms, filters. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.config import Config
from megatron_opd.recipe.advantage import distillation_gaps, train_sample
from megatron_opd.recipe.calibrate import Calibration, CalibrationReport, calibrate, trajectory_return
from megatron_opd.recipe.outcome import constant_rewards, group_advantages, placebo_outcomes, sign_agrees
from megatron_opd.recipe.topk import topk_overlap
from megatron_opd.records import Calibrated, Outcome, Scored, TrainSample


@dataclass(frozen=True, slots=True, eq=False)
class StepObjective:
    """What the recipe made of one step."""

    rollouts: list[Calibrated]  # one for each scored rollout, in the same order
    samples: list[TrainSample]  # of those that are trained on
    calibration: CalibrationReport | None  # None without calibration


def step_objective(scored: list[Scored], balanced: np.ndarray, config: Config, step: int) -> StepObjective:
    """Advantages of one step's rollouts. ``balanced`` [n] bool: false for what balancing dropped after scoring.

    All of ``scored`` takes part in the margins and group means; trained is what ``balanced``, the margin mask and the
    sign filter all keep. ``step``: number of the weights that are trained. ``config.seed`` matters only where outcomes
    are permuted (placebo).
    Raises ValueError when log-probs are missing or lengths differ. Cost: linear in tokens, without a loop over them.
    """
    objective = config.objective
    terms = [distillation_gaps(item, objective, config.loss.max_gap) for item in scored]
    returns = np.array([trajectory_return(gaps, mask) for gaps, mask in terms], dtype=np.float64)
    outcomes = np.array([item.verified.outcome for item in scored], dtype=np.int8)
    groups = np.array([item.verified.rollout.group for item in scored], dtype=np.int64)
    calibration = _calibration(returns, outcomes, groups, config, step)
    offsets = calibration.offsets if calibration else np.zeros(len(scored))
    trained = balanced & calibration.keep if calibration else balanced
    if objective.sign_filter:
        trained = trained & sign_agrees(returns, outcomes)
    # Without a trained token there is no return: such a rollout is in no margin, so it is in no other comparison.
    extra = _outcome_terms(np.where(np.isfinite(returns), outcomes, Outcome.UNKNOWN), groups, config)
    rollouts = [
        Calibrated(
            item,
            *term,
            mean_gap=float(returns[i]),
            offset=float(offsets[i]),
            outcome_term=float(extra[i]),
            topk_overlap=_mean_overlap(item),
            balanced=bool(balanced[i]),
            trained=bool(trained[i]),
        )
        for i, (item, term) in enumerate(zip(scored, terms, strict=True))
    ]
    samples = [train_sample(item, objective, config.loss.normalize, step) for item in rollouts if item.trained]
    return StepObjective(rollouts, samples, calibration.report if calibration else None)


def _calibration(
    returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray, config: Config, step: int
) -> Calibration | None:
    if config.calibration is None:
        return None
    if config.objective.placebo:
        outcomes = placebo_outcomes(outcomes, groups, seed=config.seed, step=step)
    return calibrate(returns, outcomes, groups, config.calibration)


def _outcome_terms(outcomes: np.ndarray, groups: np.ndarray, config: Config) -> np.ndarray:
    """What outcomes add to each token beside calibration, [n] float64 nats."""
    objective = config.objective
    total = np.zeros(len(outcomes))
    if objective.group_advantage > 0:
        scaled = objective.group_advantage_scaled
        total += objective.group_advantage * group_advantages(outcomes, groups, scale_by_deviation=scaled)
    if objective.constant_reward > 0:
        direction = objective.constant_direction
        total += constant_rewards(outcomes, groups, reward=objective.constant_reward, direction=direction)
    return total


def _mean_overlap(scored: Scored) -> float | None:
    """Over the positions of a response; None where one of the two has no rows."""
    own = scored.verified.rollout.top_ids
    return None if own is None or scored.top is None else float(topk_overlap(own, scored.top.ids).mean())
