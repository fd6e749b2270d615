"""Packing: sequences into rows of a token budget, rows onto data-parallel ranks. Pure numpy."""

from __future__ import annotations

import numpy as np

from megatron_opd.records import PackedBatch, TrainSample


def loss_denominator(samples: list[TrainSample]) -> float:
    """Normaliser of the whole batch's loss: the sum of all token weights; 1 when nothing is trained."""
    total = float(sum(sample.weights.sum(dtype=np.float64) for sample in samples))
    return total if total > 0 else 1.0


def fill_rows(lengths: list[int], row_tokens: int) -> list[list[int]]:
    """Indices of the sequences of each row: first-fit decreasing. A sequence longer than the budget has its own row.

    Cost: O(sequences * rows), over sequences and not tokens.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        place = next((row for row, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            rows.append([index])
            room.append(row_tokens - lengths[index])
        else:
            rows[place].append(index)
            room[place] -= lengths[index]
    return rows


def spread_rows(rows: list[list[int]], lengths: list[int], ranks: int) -> list[list[list[int]]]:
    """Rows of each rank, longest first to the rank with the fewest tokens."""
    load = [0] * ranks
    spread: list[list[list[int]]] = [[] for _ in range(ranks)]
    for row in sorted(rows, key=lambda row: -sum(lengths[i] for i in row)):
        rank = int(np.argmin(load))
        spread[rank].append(row)
        load[rank] += sum(lengths[i] for i in row)
    return spread


def pack(
    samples: list[TrainSample], row_tokens: int, ranks: int, *, version: int, last: bool = False
) -> list[PackedBatch]:
    """One batch for each data-parallel rank, with one common denominator. A rank without a sample gets no row."""
    lengths = [len(sample.token_ids) for sample in samples]
    denominator = loss_denominator(samples)
    spread = spread_rows(fill_rows(lengths, row_tokens), lengths, ranks)
    return [_pack_rank([[samples[i] for i in row] for row in rows], denominator, version, last) for rows in spread]


def _pack_rank(rows: list[list[TrainSample]], denominator: float, version: int, last: bool) -> PackedBatch:
    sequences = [sample for row in rows for sample in row]
    columns = (sequences[0].top_ids.shape[1],) if sequences else (0,)
    return PackedBatch(
        version=version,
        last=last,
        denominator=denominator,
        tokens=_join([sample.token_ids for sample in sequences], np.int64),
        labels=_join([_labels(sample) for sample in sequences], np.int64),
        advantages=_join([_at_predictor(sample, sample.advantages) for sample in sequences], np.float32),
        behaviour_logprobs=_join(
            [_at_predictor(sample, sample.behaviour_logprobs) for sample in sequences], np.float32
        ),
        weights=_join([_at_predictor(sample, sample.weights) for sample in sequences], np.float32),
        forward_weights=_join([_at_predictor(sample, sample.forward_weights) for sample in sequences], np.float32),
        top_ids=_join([_at_predictor(sample, sample.top_ids) for sample in sequences], np.int64, columns),
        top_logprobs=_join([_at_predictor(sample, sample.top_logprobs) for sample in sequences], np.float32, columns),
        row_offsets=_offsets([sum(len(sample.token_ids) for sample in row) for row in rows]),
        sequence_offsets=_offsets([len(sample.token_ids) for sample in sequences]),
    )


def _labels(sample: TrainSample) -> np.ndarray:
    return np.append(sample.token_ids[1:], 0)


def _at_predictor(sample: TrainSample, values: np.ndarray) -> np.ndarray:
    """Response values [R, ...] laid out over the sequence [P + R, ...], each where its token is predicted."""
    spread = np.zeros((len(sample.token_ids), *values.shape[1:]), dtype=values.dtype)
    spread[sample.prompt_length - 1 : -1] = values
    return spread


def _join(parts: list[np.ndarray], dtype: type, columns: tuple[int, ...] = ()) -> np.ndarray:
    """``parts`` [n, *columns] one after the other; [0, *columns] when there are none."""
    return np.concatenate([*parts, np.empty((0, *columns), dtype=dtype)]).astype(dtype, copy=False)


def _offsets(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths], dtype=np.int64)
