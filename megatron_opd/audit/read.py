"""The trajectories of a run as one small table: a number or word for each rollout, nothing for each token.

Cost: one pass over the files, ``BATCH`` rollouts in memory at a time; what stays is about 300 bytes for each rollout.
100,000 rollouts of 1,000 tokens: 100 million tokens pass through, about 30 MB stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_opd.errors import DataError
from megatron_opd.observe.trajectories import SCHEMA
from megatron_opd.recipe.diagnostics import REPETITION_WIDTH
from megatron_opd.recipe.repetition import repetition

BATCH = 1024  # rollouts whose tokens are in memory at once
QUARTERS = 4

_PLAIN = ("step", "group", "outcome", "state", "domain", "teacher", "reason")
_REALS = ("mean_gap", "offset", "outcome_term", "topk_overlap")
_TOKENS = ("token_ids", "student_logprobs", "gaps", "mask")


@dataclass(frozen=True, slots=True, eq=False)
class Rollouts:
    """One entry for each rollout, in the order of the files. Arrays [n]; float ones are nan where there is no score."""

    file: np.ndarray  # int64, which file it is in
    row: np.ndarray  # int64, which row of that file
    step: np.ndarray  # int32
    group: np.ndarray  # int64
    outcome: np.ndarray  # int8, as in ``records.Outcome``
    state: np.ndarray  # str, one of ``observe.trajectories.STATES``
    domain: np.ndarray  # str
    teacher: np.ndarray  # str; None where it was not scored
    reason: np.ndarray  # str
    truncated: np.ndarray  # bool, cut at the token limit
    mean_gap: np.ndarray  # float64: G, before calibration
    offset: np.ndarray  # float64, nats per token
    outcome_term: np.ndarray  # float64, nats per token
    topk_overlap: np.ndarray  # float64
    tokens: np.ndarray  # int64
    surprise: np.ndarray  # float64: sum of -log pi_student over its tokens
    repetition: np.ndarray  # float64, share of 4-grams that occurred before
    scored_tokens: np.ndarray  # int64, 0 where it was not scored
    masked_tokens: np.ndarray  # int64, of the scored ones
    gap_sum: np.ndarray  # float64, over all scored tokens
    depth_sums: np.ndarray  # [n, 4] float64: sum of the gaps of each quarter's tokens that the mask keeps
    depth_counts: np.ndarray  # [n, 4] int64

    def __len__(self) -> int:
        return len(self.step)

    def take(self, chosen: np.ndarray) -> Rollouts:
        """The rollouts at ``chosen``: indices or [n] bool."""
        return Rollouts(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @property
    def trained_gap(self) -> np.ndarray:
        """Mean over the mask of what is trained on: G plus all that outcomes add."""
        return self.mean_gap + self.offset + self.outcome_term


def trajectory_files(folder: Path) -> list[Path]:
    """The files of a run, steps in order. Raises DataError when there is none."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(
            "The run kept no trajectories",
            where=folder,
            got="a folder without a .parquet file" if folder.is_dir() else "no such folder",
            expected="a file for each recorded step, step_000001.parquet",
            fix="train with record.trajectories_every=1; 0 keeps none",
        )
    return files


def read_rollouts(files: Sequence[Path]) -> Rollouts:
    """Every rollout of ``files``. Raises DataError for a file that is cut off or not ours, or if all are empty."""
    parts = [part for number, file in enumerate(files) for part in _read_file(number, file)]
    if not parts:
        raise DataError("The trajectories hold no rollout", where=files[0].parent, got=f"{len(files)} empty files")
    names = [field.name for field in fields(Rollouts)]
    return Rollouts(**{name: np.concatenate([part[name] for part in parts]) for name in names})


def fetch(files: Sequence[Path], rollouts: Rollouts, chosen: Sequence[int]) -> dict[int, dict[str, object]]:
    """All columns of a few rollouts, tokens and texts too, by index in ``rollouts``.

    Cost: one pass over the files that they are in, ``BATCH`` rollouts in memory at a time.
    """
    found: dict[int, dict[str, object]] = {}
    for number in sorted({int(rollouts.file[index]) for index in chosen}):
        wanted = {int(rollouts.row[index]): index for index in chosen if rollouts.file[index] == number}
        with _readable(files[number]):
            first = 0
            for batch in pq.ParquetFile(files[number]).iter_batches(BATCH):
                for row in wanted.keys() & range(first, first + len(batch)):
                    found[wanted[row]] = batch.slice(row - first, 1).to_pylist()[0]
                first += len(batch)
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Tell what pyarrow finds wrong with a file."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            "A trajectories file cannot be read",
            where=path,
            got=f"{type(error).__name__}: {error}",
            expected="a complete parquet file",
            fix="move it out of the folder; the other steps are enough",
        ) from error


def _read_file(number: int, path: Path) -> Iterator[dict[str, np.ndarray]]:
    with _readable(path):
        file = pq.ParquetFile(path)
        _check_schema(path, file.schema_arrow)
        first = 0
        for batch in file.iter_batches(BATCH, columns=[*_PLAIN, *_REALS, *_TOKENS, "finish_reason"]):
            rows = np.arange(first, first + len(batch))
            yield {"file": np.full(len(batch), number), "row": rows} | _scalars(batch) | _reduced(batch)
            first += len(batch)


def _check_schema(path: Path, schema: pa.Schema) -> None:
    types = {field.name: field.type for field in schema}
    wrong = [field for field in SCHEMA if types.get(field.name) != field.type]
    if wrong:
        raise DataError(
            "A parquet file in the folder holds no trajectories",
            where=path,
            got="; ".join(f"{field.name}: {types.get(field.name, 'missing')}" for field in wrong),
            expected="; ".join(f"{field.name}: {field.type}" for field in wrong),
            fix="move it out of the folder, or use the version that wrote it",
        )


def _scalars(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    values = {name: batch[name].to_numpy(zero_copy_only=False) for name in _PLAIN + _REALS}
    return values | {"truncated": pc.equal(batch["finish_reason"], "length").to_numpy(zero_copy_only=False)}


def _reduced(batch: pa.RecordBatch) -> dict[str, np.ndarray]:
    """What remains of the tokens."""
    count = len(batch)
    lengths, ids, _ = _flat(batch["token_ids"])
    _, logprobs, owner = _flat(batch["student_logprobs"])
    scored, gaps, scored_owner = _flat(batch["gaps"])
    _, mask, _ = _flat(batch["mask"])
    place = np.arange(len(gaps)) - np.repeat(np.cumsum(scored) - scored, scored)
    cell = QUARTERS * scored_owner + QUARTERS * place // np.maximum(scored, 1)[scored_owner]
    cells = QUARTERS * count
    responses = np.split(ids, np.cumsum(lengths)[:-1])
    return {
        "tokens": lengths,
        "surprise": np.bincount(owner, -logprobs.astype(np.float64), count),
        "repetition": np.array([repetition(response, REPETITION_WIDTH) for response in responses]),
        "scored_tokens": scored,
        "masked_tokens": np.bincount(scored_owner[~mask], minlength=count),
        "gap_sum": np.bincount(scored_owner, gaps.astype(np.float64), count),
        "depth_sums": np.bincount(cell[mask], gaps[mask].astype(np.float64), cells).reshape(count, QUARTERS),
        "depth_counts": np.bincount(cell[mask], minlength=cells).reshape(count, QUARTERS),
    }


def _flat(column: pa.ListArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Length of each list [n], 0 for null; all their values one after the other [t]; the list of each value [t]."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths, column.flatten().to_numpy(zero_copy_only=False), np.repeat(np.arange(len(lengths)), lengths)
