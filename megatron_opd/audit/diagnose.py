"""All numbers of a run, from the table of its rollouts: overall, by domain, teacher and step. No model, no I/O."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from megatron_opd.audit.numbers import Numbers, graded_sides, numbers
from megatron_opd.audit.read import Rollouts
from megatron_opd.recipe.difficulty import Shape, detect_shape, pass_histogram
from megatron_opd.recipe.margin import TOLERANCE, margins
from megatron_opd.records import Outcome


@dataclass(frozen=True, slots=True)
class Difficulty:
    """Groups of one domain by their number of correct rollouts c = 0 .. samples."""

    samples: int
    early: list[int]  # [samples + 1] groups in the first third of the recorded steps
    late: list[int]  # the same for the last third; all 0 for a single step
    shape: Shape  # over the whole run
    left_out: int  # groups with a rollout of unknown outcome, or of another size


@dataclass(frozen=True, slots=True)
class Violation:
    """A group in which the teacher prefers a wrong rollout to a right one."""

    size: float  # highest incorrect minus lowest correct return, nats per token; > 0
    wrong: int  # index of the incorrect rollout with the highest return
    right: int  # index of the correct rollout with the lowest return


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All numbers of a run."""

    steps: list[int]
    overall: Numbers
    by_domain: dict[str, Numbers]
    by_teacher: dict[str, Numbers]  # of what each teacher scored
    by_step: dict[int, Numbers]
    by_step_and_domain: dict[int, dict[str, Numbers]]
    early: dict[str, Numbers]  # by domain, first third of the recorded steps
    late: dict[str, Numbers]  # last third; empty for a single step
    difficulty: dict[str, Difficulty]
    violations: list[Violation]  # largest first
    drop_reasons: dict[str, dict[str, int]]  # by domain, most frequent first
    unknown_reasons: dict[str, dict[str, int]]


def diagnose(rollouts: Rollouts, samples: int, worst: int) -> Diagnosis:
    """``samples``: rollouts of one prompt; ``worst``: most violations. Cost: some sorts of the rollouts."""
    steps = np.unique(rollouts.step)
    third = max(1, len(steps) // 3)
    early = rollouts.take(np.isin(rollouts.step, steps[:third]))
    late = rollouts.take(np.isin(rollouts.step, steps[-third:] if len(steps) > 1 else []))
    by_step = split(rollouts, rollouts.step)
    scored = rollouts.take(rollouts.scored_tokens > 0)
    domains = split(rollouts, rollouts.domain)
    lost = rollouts.state == "dropped"
    early_domains, late_domains = split(early, early.domain), split(late, late.domain)
    return Diagnosis(
        steps=steps.tolist(),
        overall=numbers(rollouts),
        by_domain=_each(domains),
        by_teacher=_each(split(scored, scored.teacher)),
        by_step={step: numbers(part) for step, part in by_step.items()},
        by_step_and_domain={step: _each(split(part, part.domain)) for step, part in by_step.items()},
        early=_each(early_domains),
        late=_each(late_domains),
        difficulty={
            domain: _difficulty(part, early_domains.get(domain), late_domains.get(domain), samples)
            for domain, part in domains.items()
        },
        violations=violations(rollouts, worst),
        drop_reasons=_reasons(rollouts.take(lost)),
        unknown_reasons=_reasons(rollouts.take((rollouts.outcome == Outcome.UNKNOWN) & ~lost)),
    )


def split(rollouts: Rollouts, labels: np.ndarray) -> dict:
    """The rollouts of each label, by ascending label."""
    names, label = np.unique(labels, return_inverse=True)
    order = np.argsort(label, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(label, minlength=len(names)))[:-1]) if len(names) else []
    return {name: rollouts.take(part) for name, part in zip(names.tolist(), parts, strict=True)}


def violations(rollouts: Rollouts, most: int) -> list[Violation]:
    """The groups with the largest distance from a right rollout up to a wrong one, largest first."""
    graded, sides = graded_sides(rollouts)
    sizes = -margins(sides, sides.badness, np.ones(len(sides.index), dtype=bool), "minmax")
    ends = graded[sides.index[sides.starts + sides.counts - 1]].reshape(-1, 2)  # the worst of each side
    order = np.argsort(-sizes, kind="stable")[:most]
    return [
        Violation(size=float(sizes[unit]), wrong=int(ends[unit, 0]), right=int(ends[unit, 1]))
        for unit in order
        if sizes[unit] > TOLERANCE
    ]


def _each(parts: dict) -> dict:
    return {name: numbers(part) for name, part in parts.items()}


def _difficulty(whole: Rollouts, early: Rollouts | None, late: Rollouts | None, samples: int) -> Difficulty:
    passes, left_out = _passes(whole, samples)
    parts = [np.zeros(0, dtype=np.int64) if part is None else _passes(part, samples)[0] for part in (early, late)]
    return Difficulty(
        samples=samples,
        early=pass_histogram(parts[0], samples).tolist(),
        late=pass_histogram(parts[1], samples).tolist(),
        shape=detect_shape(pass_histogram(passes, samples)),
        left_out=left_out,
    )


def _passes(rollouts: Rollouts, samples: int) -> tuple[np.ndarray, int]:
    """Correct rollouts of each group with ``samples`` graded ones, and the number of other groups."""
    ids, group = np.unique(rollouts.group, return_inverse=True)
    graded = np.bincount(group, rollouts.outcome != Outcome.UNKNOWN, len(ids))
    correct = np.bincount(group[rollouts.outcome == Outcome.CORRECT], minlength=len(ids))
    whole = (graded == samples) & (np.bincount(group, minlength=len(ids)) == samples)
    return correct[whole], int((~whole).sum())


def _reasons(rollouts: Rollouts) -> dict[str, dict[str, int]]:
    return {
        domain: dict(Counter(part.reason.tolist()).most_common())
        for domain, part in split(rollouts, rollouts.domain).items()
    }
