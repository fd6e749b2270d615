"""A bounded choice of rollouts for the report: some of each domain, outcome and fate, from a few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_opd.audit.heatmap import Heat, TokenTexts, colour_limit, heat, visible
from megatron_opd.audit.panels import Panel, shift_histograms
from megatron_opd.audit.pictures import Pictures, Shown
from megatron_opd.audit.read import Rollouts, fetch, read_rollouts
from megatron_opd.observe.trajectories import STATES

FILES = 3  # steps that rollouts are shown of: the first, one in the middle, the newest
ROLLOUTS = 48  # most that are shown
TOKENS = (250, 100)  # of a long response: the first and the last
LETTERS = 4000  # of a prompt, or of a response that was not scored
FATES = {
    "trained": "trained on",
    "filtered": "filtered",
    "balanced_out": "balanced out",
    "dropped": "dropped: the teacher failed",
}
OUTCOMES = {1: ("right", "o1"), 0: ("wrong", "o0"), -1: ("not graded", "ou")}


@dataclass(frozen=True, slots=True)
class Sample:
    """One rollout."""

    step: int
    group: int
    domain: str
    outcome: str
    style: str  # CSS class of the outcome
    reason: str
    fate: str
    state: str
    prompt_id: str
    prompt: str
    pictures: list[Shown]
    answer: str
    response: str  # where there is no heat-map
    tokens: int
    cut: bool
    mean_gap: float | None
    offset: float | None
    heat: Heat | None


@dataclass(frozen=True, slots=True)
class Browser:
    """The rollouts that are shown, and returns before and after calibration of all rollouts of these steps."""

    steps: list[int]
    samples: list[Sample]
    limit: float  # value of the strongest colour
    returns: dict[str, list[Panel]]  # by domain


def browse(files: Sequence[Path], texts: TokenTexts, pictures: Pictures) -> Browser:
    """``files``: trajectories of all recorded steps, at least one. Cost: reads FILES of them twice."""
    chosen = [files[i] for i in sorted({0, len(files) // 2, len(files) - 1})][-FILES:]
    rollouts = read_rollouts(chosen)
    picked = pick(rollouts, ROLLOUTS)
    rows = fetch(chosen, rollouts, picked)
    ordered = [rows[index] for index in picked]
    limit = colour_limit([row for row in ordered if row["gaps"] is not None])
    scored = rollouts.take(np.isfinite(rollouts.mean_gap))
    return Browser(
        steps=sorted({int(step) for step in rollouts.step}),
        samples=[_sample(row, texts, pictures, limit) for row in ordered],
        limit=limit,
        returns={
            visible(domain): shift_histograms(visible(domain), scored.take(scored.domain == domain))
            for domain in np.unique(scored.domain)
        },
    )


def pick(rollouts: Rollouts, most: int) -> list[int]:
    """Indices of at most ``most`` rollouts: in turn from every step, domain, outcome and state; newest step first."""
    kinds: dict[tuple, list[int]] = {}
    for index in range(len(rollouts.step)):
        kind = (-int(rollouts.step[index]), str(rollouts.domain[index]), -int(rollouts.outcome[index]))
        kinds.setdefault((*kind, STATES.index(rollouts.state[index])), []).append(index)
    kinds = {kind: _spread(own, rollouts.group) for kind, own in kinds.items()}
    chosen: list[tuple[tuple, int]] = []
    for turn in range(most):
        left = [(kind, own[turn]) for kind, own in sorted(kinds.items()) if turn < len(own)]
        chosen += left[: most - len(chosen)]
    return [index for _, index in sorted(chosen)]


def _spread(indices: list[int], groups: np.ndarray) -> list[int]:
    """The first of each group, then the second of each, and so on."""
    turns: dict[int, int] = {}
    ranked = []
    for index in indices:
        turn = turns.get(int(groups[index]), 0)
        turns[int(groups[index])] = turn + 1
        ranked.append((turn, index))
    return [index for _, index in sorted(ranked)]


def _sample(row: dict, texts: TokenTexts, pictures: Pictures, limit: float) -> Sample:
    name, style = OUTCOMES[row["outcome"]]
    scored = row["gaps"] is not None
    return Sample(
        step=row["step"],
        group=row["group"],
        domain=row["domain"],
        outcome=name,
        style=style,
        reason=visible(row["reason"]),
        fate=FATES[row["state"]],
        state=row["state"],
        prompt_id=visible(row["prompt_id"]),
        prompt=_short(row["prompt"]),
        pictures=pictures(row["images"]),
        answer=_short(row["answer"]),
        response="" if scored else _short(row["response"]),
        tokens=len(row["token_ids"]),
        cut=row["finish_reason"] == "length",
        mean_gap=row["mean_gap"],
        offset=row["offset"],
        heat=heat(row, texts, limit, TOKENS) if scored else None,
    )


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= LETTERS else f"{shown[:LETTERS]} ... {len(shown) - LETTERS:,} letters left out"
