"""The charts of the page, from the numbers and the table of rollouts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from megatron_opd.audit import formats
from megatron_opd.audit.charts import WIDE, Outline, Series, bar_chart, histogram_chart, line_chart, widened
from megatron_opd.audit.diagnose import Diagnosis, Difficulty, split
from megatron_opd.audit.numbers import Numbers, numbers
from megatron_opd.audit.read import QUARTERS, Rollouts
from megatron_opd.records import Outcome

OUTCOMES = (("right", "o1", Outcome.CORRECT), ("wrong", "o0", Outcome.INCORRECT), ("unknown", "ou", Outcome.UNKNOWN))
POINTS = 30  # most points of a line over the steps
BINS = 32
TAIL = 0.002  # share of returns at either end that the outermost bins hold


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart with its title and how to read it."""

    title: str
    meaning: str
    chart: Markup


@dataclass(frozen=True, slots=True)
class Returns:
    """The charts of one domain, and how many returns of each outcome are in them."""

    counts: list[tuple[str, str, int]]  # name, CSS class, rollouts
    panels: list[Panel]


@dataclass(frozen=True, slots=True)
class Curve:
    """A number that is drawn over the steps."""

    title: str
    meaning: str
    pick: Callable[[Numbers], float | None]
    form: Callable[[float], str]
    reference: float | None = None


CURVES = (
    Curve("Correct ratio", "of graded rollouts", lambda n: n.correct_ratio, formats.percent_tick),
    Curve("Pairwise AUC", "before the shift; dashed: chance", lambda n: n.order.auc, formats.tick, 0.5),
    Curve("Consistency", "of mixed groups, before the shift", lambda n: n.order.consistency, formats.percent_tick),
    Curve("Mean gap, right - wrong", "before the shift, nats per token", lambda n: n.order.mean_gap, formats.tick, 0.0),
    Curve("Mean |offset|", "what calibration adds, nats per token", lambda n: n.mean_offset, formats.tick),
    Curve("Length", "mean tokens of a response", lambda n: n.length, formats.tick),
    Curve("Entropy", "of the student, nats per token", lambda n: n.entropy, formats.tick),
    Curve("Kept by balancing", "share of all rollouts", lambda n: n.kept_share, formats.percent_tick),
)


def curves(rollouts: Rollouts, diagnosis: Diagnosis, styles: dict[str, str]) -> list[Panel]:
    """Small multiples over the steps, a line for each domain; ``styles``: CSS class of each domain.

    A point stands for all rollouts of ``steps_per_point`` steps.
    """
    steps = np.array(diagnosis.steps)
    pooled = steps_per_point(diagnosis)
    windows = [steps[start : start + pooled] for start in range(0, len(steps), pooled)]
    window = np.searchsorted(steps, rollouts.step) // pooled
    parts = [
        {domain: numbers(own) for domain, own in split(part, part.domain).items()}
        for part in split(rollouts, window).values()
    ]
    x = [
        ((own[0] + own[-1]) / 2, f"step {own[0]}" if pooled == 1 else f"steps {own[0]} to {own[-1]}") for own in windows
    ]
    panels = []
    for curve in CURVES:
        lines = [
            Series(domain, style, [curve.pick(part[domain]) if domain in part else None for part in parts])
            for domain, style in styles.items()
        ]
        chart = line_chart(curve.title, x, lines, curve.form, reference=curve.reference, x_label="step")
        panels.append(Panel(curve.title, curve.meaning, chart))
    return panels


def steps_per_point(diagnosis: Diagnosis) -> int:
    """How many consecutive steps a point of the curves stands for."""
    return math.ceil(len(diagnosis.steps) / POINTS)


def returns(rollouts: Rollouts, diagnosis: Diagnosis) -> dict[str, Returns]:
    """For each domain: returns by outcome before and after the shift, with the same axes, and the gap by quarter."""
    scored = rollouts.take(np.isfinite(rollouts.mean_gap))
    return {
        domain: Returns(
            [
                (name, style, int((part.outcome == outcome).sum()))
                for name, style, outcome in OUTCOMES
                if outcome in part.outcome
            ],
            [*shift_histograms(domain, part), _depth(domain, diagnosis.by_domain[domain])],
        )
        for domain, part in split(scored, scored.domain).items()
    }


def shift_histograms(domain: str, part: Rollouts) -> list[Panel]:
    """Returns of one domain by outcome, before and after the shift, with the same axes; ``part``: all were scored."""
    before, after = part.mean_gap, part.trained_gap
    ends = np.quantile(np.concatenate([before, after]), [TAIL, 1 - TAIL])
    edges = np.linspace(*widened(*ends.tolist()), BINS + 1)
    both = [_outlines(returns, part.outcome, edges) for returns in (before, after)]
    top = max(float(outline.shares.max()) for outlines in both for outline in outlines)
    return [
        Panel(title, meaning, histogram_chart(f"{domain}: {title}", edges, outlines, top, "G, nats per token"))
        for title, meaning, outlines in (
            ("Before the shift", "what the teacher thinks", both[0]),
            ("After the shift", "what is trained on: plus offset and outcome rewards", both[1]),
        )
    ]


def difficulty(diagnosis: Diagnosis, styles: dict[str, str]) -> list[Panel]:
    """For each domain: groups by number of correct rollouts, early and late."""
    shares = {domain: (_shares(item.early), _shares(item.late)) for domain, item in diagnosis.difficulty.items()}
    top = max((value for pair in shares.values() for part in pair for value in part), default=0.0)
    return [
        Panel(domain, _difficulty_meaning(item), _difficulty_chart(domain, shares[domain], styles[domain], top, item))
        for domain, item in diagnosis.difficulty.items()
    ]


def _outlines(returns: np.ndarray, outcomes: np.ndarray, edges: np.ndarray) -> list[Outline]:
    """Of each outcome that occurs; what is beyond the edges counts in the outermost bins."""
    found = []
    for name, style, outcome in OUTCOMES:
        own = returns[outcomes == outcome]
        if len(own):
            counts, _ = np.histogram(np.clip(own, edges[0], edges[-1]), edges)
            found.append(Outline(name, style, counts / len(own), float(own.mean())))
    return found


def _depth(domain: str, numbers: Numbers) -> Panel:
    lines = [Series("right", "o1", numbers.depth_correct), Series("wrong", "o0", numbers.depth_incorrect)]
    chart = line_chart(
        f"{domain}: gap by depth",
        [(quarter, f"quarter {quarter}") for quarter in range(1, QUARTERS + 1)],
        lines,
        formats.tick,
        reference=0.0,
        x_label="quarter",
        width=WIDE,
    )
    return Panel("Where in the response", "mean gap of the tokens of each quarter, before the shift", chart)


def _difficulty_chart(
    domain: str, shares: tuple[list[float], list[float]], style: str, top: float, item: Difficulty
) -> Markup:
    names = ("first third of steps", "last third of steps")
    bars = [
        Series(name, f"{style} {age}", part)
        for name, age, part in zip(names, ("early", "late"), shares, strict=True)
        if part
    ]
    return bar_chart(f"{domain}: difficulty", bars, top, f"correct, of {item.samples} rollouts")


def _difficulty_meaning(item: Difficulty) -> str:
    shape = {"U": "U-shaped", "J": "J-shaped (easy)", "mirrored_J": "mirrored J (hard)", "flat": "flat"}[item.shape]
    counts = f"{sum(item.early):,} groups in the first third, {sum(item.late):,} in the last; over the run {shape}"
    return counts + (f"; {item.left_out:,} groups left out" if item.left_out else "")


def _shares(counts: Sequence[int]) -> list[float]:
    """Empty where nothing was counted."""
    total = sum(counts)
    return [count / total for count in counts] if total else []
