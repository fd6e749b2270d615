"""Order consistency: whether the teacher's preference ranks correct rollouts above incorrect ones. Pure numpy.

All numbers are to be taken from returns **before** any shift: a shift makes them look right by construction.

For a prompt group q with correct rollouts S+(q) and incorrect ones S-(q), both non-empty ("mixed"), and returns G:

    pairs(q)       = |S+| * |S-|
    U(q)           = sum over S+ x S- of [G+ > G-] + [G+ = G-] / 2
    auc            = sum of U(q) / sum of pairs(q)                        weighted by pairs
    consistency    = share of mixed groups with min G over S+ >= max G over S-
    mean_gap       = mean over mixed groups of (mean G over S+ - mean G over S-)

Without any signal auc is 1/2 for every group size, and it estimates the same number for every group size; consistency
does not: at chance level it is 1 / binomial(|S+| + |S-|, |S+|), so it falls as groups grow. Compare auc between runs
of different group sizes. Source: order consistency of Uni-OPD (arXiv 2605.03677); U is the Mann-Whitney statistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_opd.errors import DataError
from megatron_opd.recipe.labels import check_rollouts
from megatron_opd.records import Outcome


@dataclass(frozen=True, slots=True)
class OrderReport:
    """The numbers of the module's docstring; None where no group is mixed (mixed_share: no group at all)."""

    auc: float | None  # in [0, 1]
    consistency: float | None  # in [0, 1]
    mean_gap: float | None  # in the unit of the returns
    mixed_share: float | None  # mixed groups / groups
    groups: int  # groups with at least one graded rollout of finite return
    mixed_groups: int
    pairs: int  # over all mixed groups
    used: int  # rollouts that took part
    excluded: int  # rollouts of unknown outcome or non-finite return, which take part in nothing


@dataclass(frozen=True, slots=True, eq=False)
class GroupOrder:
    """One row for each group that has a graded rollout of finite return, by ascending group id."""

    ids: np.ndarray  # [g] the group's id
    pairs: np.ndarray  # [g] int64, 0 for a one-sided group
    wins: np.ndarray  # [g] float64: U(q), 0 for a one-sided group
    consistent: np.ndarray  # [g] bool, false for a one-sided group
    gaps: np.ndarray  # [g] float64: difference of the means, 0 for a one-sided group


def order_report(returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray) -> OrderReport:
    """Order consistency of all rollouts. ``returns`` [n] float, ``outcomes`` [n] integer, ``groups`` [n] integer.

    Raises DataError (a ValueError) for arrays of another type or length. Cost: one sort of the rollouts.
    """
    check_rollouts(returns, outcomes, groups)
    rows = group_order(returns, outcomes, groups)
    return _summary(rows, np.ones(len(rows.ids), dtype=bool), _usable(returns, outcomes))


def order_by_label(
    returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray, labels: np.ndarray
) -> dict[str, OrderReport]:
    """``order_report`` of each label (domain or teacher), by ascending label. ``labels`` [n]: one value for a group.

    Raises DataError where a group carries two labels: pairs of different teachers are not comparable.
    """
    check_rollouts(returns, outcomes, groups)
    if labels.shape != groups.shape:
        raise DataError(
            "labels and groups differ in shape", got=f"{labels.shape} and {groups.shape}", expected="one [n]"
        )
    names, label = np.unique(labels, return_inverse=True)
    ids, first, group = np.unique(groups, return_index=True, return_inverse=True)
    torn = label != label[first][group]
    if torn.any():
        raise DataError(
            "a group carries two labels", got=f"group {groups[torn][0]}", expected="one label for each group"
        )
    rows, usable = group_order(returns, outcomes, groups), _usable(returns, outcomes)
    label_of_row = label[first][np.searchsorted(ids, rows.ids)]
    return {
        str(name): _summary(rows, label_of_row == index, usable[label == index]) for index, name in enumerate(names)
    }


def group_order(returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray) -> GroupOrder:
    """Order statistics of each group; arguments as ``order_report``.

    U comes from mid-ranks within the group (ties share the mean of their places), U = sum of the ranks over S+ minus
    |S+| (|S+| + 1) / 2; twice the ranks are whole numbers, so that U is exact.
    """
    usable = _usable(returns, outcomes)
    values, correct = returns[usable].astype(np.float64), outcomes[usable] == Outcome.CORRECT
    ids, group = np.unique(groups[usable], return_inverse=True)
    count = len(ids)
    positive = np.bincount(group[correct], minlength=count)
    negative = np.bincount(group[~correct], minlength=count)
    mixed = (positive > 0) & (negative > 0)

    order = np.lexsort((values, group))
    ranks = _doubled_ranks(values[order], group[order])
    ranked_correct = correct[order]
    doubled = np.zeros(count, dtype=np.int64)
    np.add.at(doubled, group[order][ranked_correct], ranks[ranked_correct])

    lowest, highest = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(lowest, group[correct], values[correct])
    np.maximum.at(highest, group[~correct], values[~correct])
    means = np.bincount(group[correct], values[correct], count) / np.maximum(positive, 1)
    means -= np.bincount(group[~correct], values[~correct], count) / np.maximum(negative, 1)
    return GroupOrder(
        ids=ids,
        pairs=positive * negative,
        wins=np.where(mixed, (doubled - positive * (positive + 1)) / 2, 0.0),
        consistent=mixed & (lowest >= highest),
        gaps=np.where(mixed, means, 0.0),
    )


def _doubled_ranks(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Twice the mid-rank (from 1) of each row in its group, int64; rows are sorted by group, then by value."""
    place = np.arange(len(values))
    new_group = np.append(True, group[1:] != group[:-1])[: len(values)]
    new_run = new_group | np.append(True, values[1:] != values[:-1])[: len(values)]
    starts = np.flatnonzero(new_run)
    ends = np.append(starts[1:], len(values))
    run = np.cumsum(new_run) - 1
    group_start = np.maximum.accumulate(np.where(new_group, place, 0))
    return (starts + ends + 1)[run] - 2 * group_start


def _usable(returns: np.ndarray, outcomes: np.ndarray) -> np.ndarray:
    return np.isfinite(returns) & (outcomes != Outcome.UNKNOWN)


def _summary(rows: GroupOrder, chosen: np.ndarray, usable: np.ndarray) -> OrderReport:
    """``chosen`` [g] bool: the groups to report on; ``usable`` [m] bool: which of their rollouts took part."""
    mixed = chosen & (rows.pairs > 0)
    pairs, mixed_groups, groups = int(rows.pairs[mixed].sum()), int(mixed.sum()), int(chosen.sum())
    return OrderReport(
        auc=float(rows.wins[mixed].sum() / pairs) if pairs else None,
        consistency=float(rows.consistent[mixed].mean()) if pairs else None,
        mean_gap=float(rows.gaps[mixed].mean()) if pairs else None,
        mixed_share=mixed_groups / groups if groups else None,
        groups=groups,
        mixed_groups=mixed_groups,
        pairs=pairs,
        used=int(usable.sum()),
        excluded=int((~usable).sum()),
    )
