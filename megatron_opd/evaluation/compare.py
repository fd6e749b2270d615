"""``megatron-opd compare A B``: whether B is better than A on the same problems, or whether it is chance."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_opd.errors import DataError
from megatron_opd.evaluation.results import Evaluation, Problem, by_benchmark, read_problems
from megatron_opd.evaluation.statistics import Difference, difference

MOST_TOLD = 3  # problems in an error


@dataclass(frozen=True)
class Comparison:
    """One benchmark."""

    first: float | None  # accuracy on the problems that both could be graded on; None where there are none
    second: float | None
    difference: Difference | None
    left_out: int  # problems that one of the two could not be graded on


def compare(first: Path, second: Path, seed: int = 0) -> tuple[Evaluation, Evaluation, dict[str, Comparison]]:
    """Both evaluations, and the comparison by benchmark. Raises DataError when their problems differ."""
    a, b = read_problems(first), read_problems(second)
    _check_same(a, b, f"{first} and {second}")
    theirs = {problem.id: problem for problem in b.problems}
    groups = by_benchmark(a.problems)
    return a, b, {name: _compare(group, [theirs[p.id] for p in group], seed) for name, group in groups.items()}


def other_settings(a: Evaluation, b: Evaluation) -> list[str]:
    """What was not done alike, a line each."""
    keys = [key for key in a.settings | b.settings if a.settings.get(key) != b.settings.get(key)]
    return [f"{key}: {a.settings.get(key)} and {b.settings.get(key)}" for key in keys]


def comparison_json(a: Evaluation, b: Evaluation, found: dict[str, Comparison]) -> str:
    """The comparison for a program."""
    rows = {name: asdict(row) for name, row in found.items()}
    plain = {"first": a.model, "second": b.model, "not_alike": other_settings(a, b), "benchmarks": rows}
    return json.dumps(plain, indent=2)


def _compare(first: Sequence[Problem], second: Sequence[Problem], seed: int) -> Comparison:
    pairs = [(a.share, b.share) for a, b in zip(first, second, strict=True) if a.graded and b.graded]
    shares = [list(column) for column in zip(*pairs, strict=True)] or [[], []]
    means = [sum(column) / len(column) if column else None for column in shares]
    return Comparison(*means, difference(*shares, seed), len(first) - len(pairs))


def _check_same(a: Evaluation, b: Evaluation, where: str) -> None:
    ours, theirs = ({problem.id: problem.problem for problem in found.problems} for found in (a, b))
    kinds = {
        "only in the first": [name for name in ours if name not in theirs],
        "only in the second": [name for name in theirs if name not in ours],
        "with another text or answer": [name for name in ours if name in theirs and ours[name] != theirs[name]],
    }
    told = [
        f"{len(names)} {kind}, such as {', '.join(sorted(names)[:MOST_TOLD])}" for kind, names in kinds.items() if names
    ]
    if told:
        raise DataError(
            "The two evaluations are not of the same problems",
            where=where,
            got="; ".join(told),
            expected="the same problems, so that they can be compared one by one",
            fix="evaluate both models with the same config",
        )
