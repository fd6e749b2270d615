"""Outcome-guided margin calibration: one pure function from returns and outcomes to offsets and a keep mask.

A worked example, one group, mean margin, spread, delta 0.4: correct returns [-0.3, -0.1], incorrect returns [0.0].
The margin is -0.2 - 0.0 = -0.2, the shift 0.4 - (-0.2) = 0.6: offsets [+0.3, +0.3] and [-0.3], margin 0.4 after.
The offset is added to the advantage of each trained token of the trajectory, so that its mean gap moves by as much.
docs/calibration.md states and proves what this does and does not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.labels import check_rollouts
from megatron_opd.recipe.margin import TOLERANCE, Sides, arrange, dense, deviations, margins
from megatron_opd.recipe.mask import keep_greedily, keep_groups
from megatron_opd.recipe.shift import improvements
from megatron_opd.records import Outcome

# All-gathers a rank's rows, [n_local, 3] float64 -> ([n, 3] float64 in the order of ranks, first row of this rank).
Gather = Callable[[np.ndarray], tuple[np.ndarray, int]]

_EXACT_IN_FLOAT64 = 2**53


@dataclass(frozen=True, slots=True)
class CalibrationReport:
    """What a calibration met and did. Margins are per prompt group, whatever the scope. None: nothing to average.

    Graded: outcome known and return finite. Mixed group: it has a correct and an incorrect graded trajectory.
    """

    trajectories: int
    graded: int
    groups: int
    mixed_groups: int
    consistent_before: float | None  # share of mixed groups with every correct return >= every incorrect one
    margin_before: float | None  # mean over mixed groups, nats per token; under "hinge" the minmax margin
    margin_after: float | None  # mean over groups that are still mixed
    changed_groups: float | None  # share of mixed groups in which something was shifted or removed
    shifted: float | None  # share of graded trajectories with an offset
    mean_shift: float | None  # mean absolute offset over graded trajectories, nats per token
    max_shift: float | None  # largest absolute offset
    kept: float | None  # share of graded trajectories that the mask keeps


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """What to add to each trajectory's token advantages, and which trajectories to train on."""

    offsets: np.ndarray  # [n] float64, nats per token
    keep: np.ndarray  # [n] bool
    report: CalibrationReport


def trajectory_return(gaps: np.ndarray, mask: np.ndarray) -> float:
    """G = mean of the token gaps [R] over the tokens that are trained on (mask [R] bool); nan when there is none.

    Tokens that the gap mask takes out of the loss do not count here either, so |G| is below the mask's bound.
    Source: Uni-OPD (arXiv 2605.03677): a mean, not a sum, so that length does not decide. Raises ValueError when the
    lengths differ.
    """
    if gaps.shape != mask.shape or mask.dtype != bool:
        raise ValueError(f"got gaps {gaps.shape} and mask {mask.shape} of {mask.dtype}, expected equal shapes and bool")
    return float(gaps[mask].mean(dtype=np.float64)) if mask.any() else float("nan")


def calibrate(returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray, options: CalibrationConfig) -> Calibration:
    """Offsets and keep mask that give each unit (a group or the batch) the margin of ``options``.

    returns [n] float: mean token gap of each trajectory over its trained tokens, nats (``trajectory_return``).
    outcomes [n] signed int: 1 correct, 0 incorrect, -1 unknown. groups [n] signed int: any numbers, equal for the
    rollouts of one sampled prompt.

    Unknown outcomes and non-finite returns (a failed teacher, no trained token) take no part: their offset is 0, their
    keep is True, whether they are trained on is decided elsewhere. So it is for units with only one outcome; with
    scope "global" only the batch is a unit. Results do not depend on the order of the input, with one exception: where
    "mask" must choose between equal returns of one side, the later one goes, so the kept values are the same.

    Raises DataError (a ValueError) for a wrong type, shape, length or outcome. Source and meaning of the options:
    ``CalibrationConfig``. Cost: O(n log n), sorts only.
    """
    check_rollouts(returns, outcomes, groups)
    values = returns.astype(np.float64)
    graded = np.flatnonzero((outcomes != Outcome.UNKNOWN) & np.isfinite(values))
    numbers, number = np.unique(groups, return_inverse=True)
    taking_part = (values[graded], outcomes[graded])
    levels = dense(values[graded])
    prompts = arrange(*taking_part, number[graded], levels)
    whole = options.scope == "global"
    sides = arrange(*taking_part, np.zeros_like(graded), levels) if whole else prompts
    delta = np.full(len(sides.counts) // 2, float(options.delta))
    if options.delta_unit == "sigma":
        delta *= deviations(sides)

    moved, kept = np.zeros(len(graded)), np.ones(len(graded), dtype=bool)
    if options.method == "shift":
        moved[sides.index] = sides.signs * improvements(sides, delta, options)
    elif options.method == "mask":
        kept[sides.index] = keep_greedily(sides, delta, options.margin, options.min_retain)
    elif options.method == "mask_group":
        kept[sides.index] = keep_groups(sides, delta, options.margin)
    offsets, keep = np.zeros(len(values)), np.ones(len(values), dtype=bool)
    offsets[graded], keep[graded] = moved, kept
    return Calibration(offsets, keep, _report(prompts, moved, kept, options, (len(values), len(numbers))))


def calibrate_sharded(
    returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray, options: CalibrationConfig, gather: Gather
) -> Calibration:
    """``calibrate`` over the trajectories of all data-parallel ranks; returns this rank's slice and the whole report.

    Every rank must call it, also one without a trajectory. ``gather`` is the only communication: 24 bytes for each
    trajectory, and every rank computes the same from the same rows, so the bits do not depend on the split. The order
    of ranks is the order of the input (it matters for equal returns under "mask" only). Groups may be cut anywhere.

    Raises ValueError as ``calibrate`` does, for group numbers of 2**53 and more (they travel as float64), and when
    ``gather`` does not return this rank's rows unchanged. A rank that raises leaves the others waiting in ``gather``.
    """
    check_rollouts(returns, outcomes, groups)
    values = returns.astype(np.float64)
    if len(groups) and not -_EXACT_IN_FLOAT64 < int(groups.min()) <= int(groups.max()) < _EXACT_IN_FLOAT64:
        raise ValueError(f"groups: got {groups.min()} to {groups.max()}, expected numbers below 2**53 in size")
    local = np.stack([values, outcomes.astype(np.float64), groups.astype(np.float64)], axis=1)
    rows, first = gather(local)
    own = slice(first, first + len(local))
    if rows.dtype != np.float64 or rows.ndim != 2 or not np.array_equal(rows[own], local, equal_nan=True):
        raise ValueError(f"gather: got {rows.dtype} {rows.shape} and first row {first}, expected own rows unchanged")
    whole = calibrate(rows[:, 0], rows[:, 1].astype(np.int8), rows[:, 2].astype(np.int64), options)
    return Calibration(whole.offsets[own], whole.keep[own], whole.report)


def _report(
    prompts: Sides, moved: np.ndarray, kept: np.ndarray, options: CalibrationConfig, totals: tuple[int, int]
) -> CalibrationReport:
    """moved, kept: offset and keep of each graded trajectory; totals: trajectories and groups of the input."""
    own_moved, own_kept = moved[prompts.index], kept[prompts.index]
    everything = np.ones(len(own_moved), dtype=bool)
    order = margins(prompts, prompts.badness, everything, "minmax")
    before = margins(prompts, prompts.badness, everything, options.margin)
    after = margins(prompts, prompts.badness - prompts.signs * own_moved, own_kept, options.margin)
    changed = np.logical_or.reduceat((own_moved != 0) | ~own_kept, prompts.starts[0::2])
    sizes = np.abs(moved)
    return CalibrationReport(
        trajectories=totals[0],
        graded=len(moved),
        groups=totals[1],
        mixed_groups=len(order),
        consistent_before=_mean(order >= -TOLERANCE),
        margin_before=_mean(before),
        margin_after=_mean(after[~np.isnan(after)]),
        changed_groups=_mean(changed),
        shifted=_mean(sizes > 0),
        mean_shift=_mean(sizes),
        max_shift=float(sizes.max()) if len(sizes) else None,
        kept=_mean(kept),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean(dtype=np.float64)) if len(values) else None
