"""Packing: sequences into rows of a token budget, rows onto data-parallel ranks. Pure numpy."""

from __future__ import annotations

import heapq

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


def sequence_costs(lengths: list[int], attention_length: float) -> np.ndarray:
    """Training cost of each sequence, in tokens of a very short one: L (1 + L / attention_length), [n] float64.

    attention_length: length at which causal attention costs as much as the matrix products; about 12 hidden sizes for
    a dense transformer (24 h^2 operations a token and layer against 2 h L). Raises ValueError when it is not > 0.
    """
    if not attention_length > 0:
        raise ValueError(f"got attention_length {attention_length}, expected > 0")
    tokens = np.asarray(lengths, dtype=np.float64)
    return tokens * (1.0 + tokens / attention_length)


def spread(costs: np.ndarray, ranks: int) -> list[list[int]]:
    """Indices of each of ``ranks`` parts, so that the sums of ``costs`` [n] are close: Karmarkar and Karp (1982).

    The largest differencing method: the two partial partitions whose parts differ most are joined, the largest part of
    one with the smallest of the other, until one partition is left. Cost: O(n ranks log ranks + n log n).
    """
    heap: list[tuple[float, int, np.ndarray, list[list[int]]]] = []
    for index, cost in enumerate(costs.tolist()):
        sums, parts = np.zeros(ranks), [[] for _ in range(ranks)]
        sums[0], parts[0] = cost, [index]
        heap.append((-cost, index, sums, parts))  # sums descend; the index breaks ties
    heapq.heapify(heap)
    while len(heap) > 1:
        _, tie, sums, parts = heapq.heappop(heap)
        _, _, other_sums, other_parts = heapq.heappop(heap)
        sums = sums + other_sums[::-1]
        parts = [own + other for own, other in zip(parts, reversed(other_parts), strict=True)]
        order = np.argsort(-sums, kind="stable")
        sums, parts = sums[order], [parts[i] for i in order]
        heapq.heappush(heap, (float(sums[-1] - sums[0]), tie, sums, parts))
    return [sorted(part) for part in heap[0][3]] if heap else [[] for _ in range(ranks)]


def pack(
    samples: list[TrainSample],
    row_tokens: int,
    ranks: int,
    attention_length: float,
    *,
    version: int,
    last: bool = False,
) -> list[PackedBatch]:
    """One batch for each data-parallel rank, with one common denominator. A rank without a sample gets no row.

    Sequences are spread over ranks by their training cost (``sequence_costs``), then packed into rows of each rank.
    """
    lengths = [len(sample.token_ids) for sample in samples]
    denominator = loss_denominator(samples)
    batches = []
    for own in spread(sequence_costs(lengths, attention_length), ranks):
        rows = fill_rows([lengths[i] for i in own], row_tokens)
        batches.append(_pack_rank([[samples[own[i]] for i in row] for row in rows], denominator, version, last))
    return batches


def pack_metrics(batches: list[PackedBatch], row_tokens: int, attention_length: float) -> dict[str, float]:
    """How well the work is spread. Empty when nothing is trained.

    perf/imbalance   cost of the busiest rank / mean cost of a rank - 1: the share of time for which others wait
    perf/row_fill    tokens / (rows * row_tokens): rows have no padding, so this tells how large micro-batches are
    """
    costs = [sequence_costs(np.diff(batch.sequence_offsets).tolist(), attention_length).sum() for batch in batches]
    rows = sum(len(batch.row_offsets) - 1 for batch in batches)
    if rows == 0:
        return {}
    tokens = sum(len(batch.tokens) for batch in batches)
    return {"perf/imbalance": float(max(costs) / np.mean(costs) - 1), "perf/row_fill": tokens / (rows * row_tokens)}


def _pack_rank(rows: list[list[TrainSample]], denominator: float, version: int, last: bool) -> PackedBatch:
    sequences = [sample for row in rows for sample in row]
    columns = (sequences[0].top_ids.shape[1],) if sequences else (0,)
    return PackedBatch(
        version=version,
        last=last,
        paused=False,
        denominator=denominator,
        tokens=_join([sample.token_ids for sample in sequences], np.int64),
        labels=_join([_labels(sample) for sample in sequences], np.int64),
        advantages=_join([_at_predictor(sample, sample.advantages) for sample in sequences], np.float32),
        behaviour_logprobs=_join(
            [_at_predictor(sample, sample.behaviour_logprobs) for sample in sequences], np.float32
        ),
        weights=_join([_at_predictor(sample, sample.weights) for sample in sequences], np.float32),
        lags=_join([_at_predictor(sample, sample.lags) for sample in sequences], np.int32),
        slopes=_join([_at_predictor(sample, sample.slopes) for sample in sequences], np.float32),
        forward_weights=_join([_at_predictor(sample, sample.forward_weights) for sample in sequences], np.float32),
        top_ids=_join([_at_predictor(sample, sample.top_ids) for sample in sequences], np.int64, columns),
        top_logprobs=_join([_at_predictor(sample, sample.top_logprobs) for sample in sequences], np.float32, columns),
        row_offsets=_offsets([sum(len(sample.token_ids) for sample in row) for row in rows]),
        sequence_offsets=_offsets([len(sample.token_ids) for sample in sequences]),
        **_images(sequences),
    )


def _images(sequences: list[TrainSample]) -> dict[str, np.ndarray]:
    """The images of all sequences, with their places among the tokens of all rows."""
    begins = _offsets([len(sample.token_ids) for sample in sequences])[:-1].tolist()
    placed = [(image, begin) for sample, begin in zip(sequences, begins, strict=True) for image in sample.images]
    hashes = b"".join(bytes.fromhex(image.hash) for image, _ in placed)
    return {
        "image_hashes": np.frombuffer(hashes, np.uint8).reshape(-1, 32),
        "image_sizes": np.array([(image.rows, image.columns) for image, _ in placed], np.int64).reshape(-1, 2),
        "image_starts": np.array([begin + image.start for image, begin in placed], np.int64),
    }


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
