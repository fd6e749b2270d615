"""The worst order violations as cards: a wrong rollout that the teacher prefers, beside a right one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.audit.diagnose import Violation
from megatron_opd.audit.heatmap import Heat, TokenTexts, heat, visible
from megatron_opd.audit.pictures import Pictures, Shown
from megatron_opd.audit.read import Rollouts

STATES = {
    "trained": "trained on",
    "filtered": "not trained on: filtered",
    "balanced_out": "not trained on: balanced out",
}


@dataclass(frozen=True, slots=True)
class Side:
    """One rollout of a card."""

    right: bool
    reason: str
    state: str
    cut: bool
    tokens: int
    repetition: float
    mean_gap: float
    offset: float
    outcome_term: float
    trained_gap: float
    heat: Heat


@dataclass(frozen=True, slots=True)
class Card:
    """One group."""

    size: float
    domain: str
    step: int
    group: int
    prompt_id: str
    prompt: str
    pictures: list[Shown]
    answer: str
    sides: tuple[Side, Side]  # wrong, right


def cards(
    found: Sequence[Violation],
    rollouts: Rollouts,
    rows: dict[int, dict],
    texts: TokenTexts,
    pictures: Pictures,
    limit: float,
) -> list[Card]:
    """``rows``: all columns of the rollouts, by index; ``limit``: value of the strongest colour."""
    return [
        Card(
            size=item.size,
            domain=rows[item.wrong]["domain"],
            step=rows[item.wrong]["step"],
            group=rows[item.wrong]["group"],
            prompt_id=visible(rows[item.wrong]["prompt_id"]),
            prompt=visible(rows[item.wrong]["prompt"]),
            pictures=pictures(rows[item.wrong]["images"]),
            answer=visible(rows[item.wrong]["answer"]),
            sides=tuple(
                _side(index, rollouts, rows[index], heat(rows[index], texts, limit))
                for index in (item.wrong, item.right)
            ),
        )
        for item in found
    ]


def _side(index: int, rollouts: Rollouts, row: dict, drawn: Heat) -> Side:
    return Side(
        right=row["outcome"] == 1,
        reason=visible(row["reason"]),
        state=STATES[row["state"]],
        cut=bool(rollouts.truncated[index]),
        tokens=int(rollouts.tokens[index]),
        repetition=float(rollouts.repetition[index]),
        mean_gap=row["mean_gap"],
        offset=row["offset"],
        outcome_term=row["outcome_term"],
        trained_gap=float(rollouts.trained_gap[index]),
        heat=drawn,
    )
