"""How far each trajectory's return moves so that its unit reaches the margin. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.margin import TOLERANCE, Sides, dense, margins, order_by, running, worst


def improvements(sides: Sides, delta: np.ndarray, options: CalibrationConfig) -> np.ndarray:
    """Nats per token that each row improves by, [K] >= 0: up for a correct, down for an incorrect trajectory.

        s = max(0, delta - margin)                                        per unit, delta [U]
        mean, minmax   share(side) * s                                    every trajectory of a side by the same
        hinge          max(0, depth(side) - (badness of the worst - own)) only what is beyond the side's bound

    share: lift 1 for correct, 0 for incorrect; drop 0, 1; spread 1/2, 1/2; balanced n-/n, n+/n. The hinge's depth is
    share * s for lift, drop and spread, so that depths add to s and the two bounds are delta apart; for balanced see
    ``_balanced_depths``. Source: Uni-OPD (arXiv 2605.03677), equation 11 and appendix C; docs/calibration.md, P1, P3.
    """
    short = delta - margins(sides, sides.badness, np.ones(len(sides.index), dtype=bool), options.margin)
    short = np.where(short > TOLERANCE, short, 0.0)
    cap = np.inf if options.max_shift is None else options.max_shift
    if options.margin != "hinge":
        return (_shares(sides, options.direction) * np.repeat(np.minimum(short, cap), 2))[sides.segment]
    if options.direction == "balanced":
        depth = _balanced_depths(sides, short)
    else:
        depth = _shares(sides, options.direction) * np.repeat(short, 2)
    beyond = depth[sides.segment] - (worst(sides)[sides.segment] - sides.badness)
    return np.where(beyond > TOLERANCE, np.minimum(beyond, cap), 0.0)


def _shares(sides: Sides, direction: str) -> np.ndarray:
    """Share of a unit's shift that each side takes, [2U]: incorrect, correct, incorrect, ..."""
    if direction == "balanced":
        incorrect, correct = sides.counts[0::2], sides.counts[1::2]
        # The pass rate is the share of the incorrect ones, so that n+ * share+ = n- * share-.
        return np.stack([correct, incorrect], axis=1).ravel() / np.repeat(incorrect + correct, 2)
    return np.tile({"lift": [0.0, 1.0], "drop": [1.0, 0.0], "spread": [0.5, 0.5]}[direction], len(sides.starts) // 2)


def _balanced_depths(sides: Sides, short: np.ndarray) -> np.ndarray:
    """Depths x (correct) and s - x (incorrect) at which both sides of a unit move by the same total, [2U].

    With e the distance of a trajectory from the worst one of its side, x solves

        sum over correct of max(0, x - e)  =  sum over incorrect of max(0, (s - e) - x).

    Left minus right rises with x and is linear between the points e and s - e, so x is found by sorting them: passing
    a correct one's point switches its term on, passing an incorrect one's switches it off. Equal totals are also what
    makes the sum of squares smallest (its derivative by x), hence the smallest correction that orders the unit.
    """
    unit, correct = sides.segment // 2, sides.segment % 2
    distance = worst(sides)[sides.segment] - sides.badness
    point = (1 - correct) * short[unit] + sides.signs * distance
    order = order_by(unit, dense(point), len(point))
    correct, point = correct[order], point[order]  # the units stay where they are
    starts = sides.starts[0::2]
    step = 2 * correct - 1
    # Terms that are on just above a point, and the sum of their points: at first those of all incorrect ones.
    on = np.cumsum(step)
    on += (sides.counts[0::2] - (on - step)[starts])[unit]
    total = running(np.add, step * point, np.arange(len(unit)) - starts[unit])
    total += np.add.reduceat((1 - correct) * point, starts)[unit]
    passed = np.add.reduceat((on * point <= total).astype(np.int64), starts)
    bracket = starts + np.maximum(passed, 1) - 1
    depth = np.clip(total[bracket] / np.maximum(on[bracket], 1), 0.0, short)
    return np.stack([short - depth, depth], axis=1).ravel()
