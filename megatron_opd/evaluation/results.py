"""What an evaluation leaves: a row for each problem, and the numbers of each benchmark.

    benchmark  id         problem   outcomes       lengths          cut             texts
    aime24     aime24/60  9f3a...   [1, 0, -1, 1]  [512, 904, ...]  [false, ...]    null
    aime24     aime24/61  77c0...   [0, 0, 0, 0]   ...

``outcomes`` has one of records.Outcome for each response; ``problem`` is a digest of question and answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_opd.errors import DataError
from megatron_opd.evaluation.statistics import Estimate, estimate, pass_at
from megatron_opd.records import Outcome

SCHEMA = pa.schema(
    [
        ("benchmark", pa.string()),
        ("id", pa.string()),
        ("problem", pa.string()),
        ("outcomes", pa.list_(pa.int8())),
        ("lengths", pa.list_(pa.int32())),
        ("cut", pa.list_(pa.bool_())),
        ("texts", pa.list_(pa.string())),
    ]
)
FILE = "problems.parquet"


@dataclass(frozen=True)
class Problem:
    """One problem with n responses."""

    benchmark: str
    id: str
    problem: str  # digest of question and answer
    outcomes: list[int]  # [n]
    lengths: list[int]  # [n] tokens
    cut: list[bool]  # [n] at the token limit
    texts: list[str] | None  # [n]; None where they are not kept

    @property
    def graded(self) -> int:
        return len(self.outcomes) - self.outcomes.count(Outcome.UNKNOWN)

    @property
    def correct(self) -> int:
        return self.outcomes.count(Outcome.CORRECT)

    @property
    def share(self) -> float:
        """Of correct responses among the graded ones, of which there must be some."""
        return self.correct / self.graded


@dataclass(frozen=True)
class Evaluation:
    """One file of problems."""

    problems: list[Problem]
    model: str
    settings: dict[str, object]  # how responses were drawn and judged


@dataclass(frozen=True)
class Scores:
    """One benchmark. Responses of unknown outcome are left out, and so are problems with too few others."""

    problems: int
    samples: int  # responses of each problem: n
    accuracy: Estimate | None  # avg@n; None where nothing could be graded
    pass_at: dict[int, Estimate | None]
    length: float  # mean tokens of a response
    longest: int
    cut: float  # share of all responses, as the next
    unknown: float


def score(problems: Sequence[Problem], pass_ks: Sequence[int], seed: int) -> Scores:
    """The numbers of one benchmark, whose problems are at least one."""
    samples = len(problems[0].outcomes)
    outcomes, lengths, cut = (np.concatenate([getattr(p, name) for p in problems]) for name in _COLUMNS)
    passes = {
        k: estimate([pass_at(k, p.graded, p.correct) for p in problems if p.graded >= k], seed)
        for k in sorted(set(pass_ks))
        if k <= samples
    }
    return Scores(
        problems=len(problems),
        samples=samples,
        accuracy=estimate([p.share for p in problems if p.graded], seed),
        pass_at=passes,
        length=float(lengths.mean()),
        longest=int(lengths.max()),
        cut=float(cut.mean()),
        unknown=float((outcomes == Outcome.UNKNOWN).mean()),
    )


_COLUMNS = ("outcomes", "lengths", "cut")


def write_problems(path: Path, found: Evaluation) -> None:
    """Write under a temporary name and rename: a reader sees all of it or the file before."""
    columns = [pa.array([getattr(p, field.name) for p in found.problems], type=field.type) for field in SCHEMA]
    metadata = {"model": found.model, "settings": json.dumps(found.settings)}
    temporary = path.with_name(f"{path.name}.tmp")
    pq.write_table(pa.table(columns, schema=SCHEMA.with_metadata(metadata)), temporary, compression="zstd")
    temporary.rename(path)


def read_problems(place: Path) -> Evaluation:
    """The content of an evaluation's folder, or of its file. Raises DataError."""
    path = place / FILE if place.is_dir() else place
    fix = f"give the folder of a finished evaluation, or its {FILE}"
    if not path.is_file():
        raise DataError("There is no finished evaluation", where=path.absolute(), fix=fix)
    try:
        table = pq.ParquetFile(path).read()
        metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
        problems = [Problem(**row) for row in table.select(SCHEMA.names).cast(SCHEMA).to_pylist()]
        return Evaluation(problems, metadata["model"], json.loads(metadata["settings"]))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        expected = f"parquet with the columns {', '.join(SCHEMA.names)}"
        raise DataError("The evaluation cannot be read", where=path, got=error, expected=expected, fix=fix) from error


def by_benchmark(problems: Sequence[Problem]) -> dict[str, list[Problem]]:
    """The problems of each benchmark, in order."""
    found: dict[str, list[Problem]] = {}
    for problem in problems:
        found.setdefault(problem.benchmark, []).append(problem)
    return found
