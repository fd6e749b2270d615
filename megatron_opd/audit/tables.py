"""The summary tables of the page: which numbers, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from megatron_opd.audit import formats
from megatron_opd.audit.numbers import Numbers


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a summary table."""

    name: str
    meaning: str
    show: Callable[[Numbers], str]


TABLES: tuple[tuple[str, str, tuple[Column, ...]], ...] = (
    (
        "What the student wrote",
        "All rollouts that were sampled.",
        (
            Column("rollouts", "all that were sampled", lambda n: formats.whole(n.rollouts)),
            Column("groups", "prompts sampled, a group of rollouts each", lambda n: formats.whole(n.groups)),
            Column("correct", "share of the graded ones", lambda n: formats.percent(n.correct_ratio)),
            Column(
                "unknown", "could not be graded; neither right nor wrong", lambda n: formats.percent(n.unknown_share)
            ),
            Column("length", "mean tokens of a response", lambda n: formats.size(n.length)),
            Column("cut off", "reached the token limit", lambda n: formats.percent(n.truncated_share)),
            Column(
                "repetition",
                "4-grams that occurred before; loops tend to 100 %",
                lambda n: formats.percent(n.repetition),
            ),
            Column("entropy", "nats per token; a fall towards 0 is a collapse", lambda n: formats.size(n.entropy)),
        ),
    ),
    (
        "What the teacher thinks of it, before calibration",
        "G is the mean gap of a rollout, teacher minus student, in nats per token. Right and wrong are compared within "
        "each group.",
        (
            Column(
                "AUC", "chance that a right G is above a wrong one; 0.5 is chance", lambda n: formats.ratio(n.order.auc)
            ),
            Column("std. error", "of the AUC, over groups", lambda n: formats.ratio(n.auc_error)),
            Column(
                "consistency",
                "mixed groups with every right G above every wrong one",
                lambda n: formats.percent(n.order.consistency),
            ),
            Column("by chance", "consistency of a random order", lambda n: formats.percent(n.chance_consistency)),
            Column("right - wrong", "mean difference of G in a mixed group", lambda n: formats.nats(n.order.mean_gap)),
            Column("deviation", "of G within a mixed group: the scale for delta", lambda n: formats.size(n.deviation)),
            Column("gap", "over all tokens: minus the reverse KL", lambda n: formats.nats(n.gap)),
            Column("overlap", "of the top-k tokens of both", lambda n: formats.percent(n.topk_overlap)),
        ),
    ),
    (
        "What the recipe did with it",
        "Balancing, filters and calibration.",
        (
            Column("kept", "by balancing, of all rollouts", lambda n: formats.percent(n.kept_share)),
            Column("filtered", "by margin mask or sign filter", lambda n: formats.percent(n.filtered_share)),
            Column("lost", "to failed teacher calls", lambda n: formats.percent(n.dropped_share)),
            Column("masked", "tokens whose gap is too large", lambda n: formats.percent(n.masked_share)),
            Column(
                "mixed",
                "groups with a right and a wrong scored rollout",
                lambda n: formats.percent(n.order.mixed_share),
            ),
            Column("changed", "mixed groups that calibration touched", lambda n: formats.percent(n.changed_groups)),
            Column("shifted", "graded rollouts with an offset", lambda n: formats.percent(n.shifted)),
            Column("mean |offset|", "of graded rollouts, nats per token", lambda n: formats.size(n.mean_offset)),
            Column("max |offset|", "an outlier shows here", lambda n: formats.size(n.max_offset)),
        ),
    ),
)


def rows(named: dict[str, Numbers]) -> list[dict[str, object]]:
    """Each table with its cells, one line for each entry of ``named``."""
    return [
        {
            "title": title,
            "meaning": meaning,
            "columns": columns,
            "lines": [(name, [column.show(numbers) for column in columns]) for name, numbers in named.items()],
        }
        for title, meaning, columns in TABLES
    ]
