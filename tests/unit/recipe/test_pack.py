"""Packing loses nothing, and the loss does not depend on how samples are split."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_opd.recipe.pack import fill_rows, loss_denominator, pack, pack_metrics, sequence_costs, spread
from megatron_opd.records import PackedBatch, TrainSample
from megatron_opd.runtime.wire import decode, encode


def sample_of(rng: np.random.Generator, prompt: int, response: int) -> TrainSample:
    """A random sequence."""
    return TrainSample(
        token_ids=rng.integers(3, 500, prompt + response),
        prompt_length=prompt,
        advantages=rng.normal(size=response).astype(np.float32),
        behaviour_logprobs=-rng.random(response).astype(np.float32),
        weights=(rng.random(response) > 0.2).astype(np.float32) / response,
        lags=rng.integers(0, 3, response, dtype=np.int32),
        slopes=rng.random(response).astype(np.float32),
        forward_weights=rng.random(response).astype(np.float32),
        top_ids=rng.integers(3, 500, (response, 2)),
        top_logprobs=-rng.random((response, 2)).astype(np.float32),
    )


def weighted_sum(batches: list[PackedBatch]) -> float:
    """The loss that a model with log-prob = label / 1000 would have: sensitive to each token's place."""
    total = sum(float((b.weights * b.advantages * b.labels / 1000).sum(dtype=np.float64)) for b in batches)
    return total / batches[0].denominator


def slow_weighted_sum(samples: list[TrainSample]) -> float:
    total, normaliser = 0.0, 0.0
    for sample in samples:
        response = sample.token_ids[sample.prompt_length :]
        for token, advantage, weight in zip(response, sample.advantages, sample.weights, strict=True):
            total += float(weight) * float(advantage) * int(token) / 1000
            normaliser += float(weight)
    return total / (normaliser or 1.0)


sizes = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 60)), min_size=1, max_size=25)


@settings(deadline=None)
@given(sizes, st.integers(1, 200), st.integers(1, 5), st.integers(0, 2**31))
def test_any_split_gives_the_same_loss_and_keeps_every_token(shapes, row_tokens, ranks, seed) -> None:
    rng = np.random.default_rng(seed)
    samples = [sample_of(rng, prompt, response) for prompt, response in shapes]
    batches = pack(samples, row_tokens, ranks, 50.0, version=7)
    assert len(batches) == ranks
    assert weighted_sum(batches) == pytest.approx(slow_weighted_sum(samples), rel=1e-5, abs=1e-6)
    assert len({batch.denominator for batch in batches}) == 1
    packed = sorted(tuple(part) for b in batches for part in np.split(b.tokens, b.sequence_offsets[1:-1]) if len(part))
    assert packed == sorted(tuple(sample.token_ids) for sample in samples)
    for batch in batches:
        lengths = np.diff(batch.row_offsets)
        alone = [length for length in lengths if length > row_tokens]
        assert all(length in [p + r for p, r in shapes] for length in alone)
        assert set(batch.row_offsets) <= set(batch.sequence_offsets)


def test_labels_never_cross_a_sequence() -> None:
    rng = np.random.default_rng(0)
    (batch,) = pack([sample_of(rng, 2, 3), sample_of(rng, 4, 2)], 100, 1, 50.0, version=0)
    for start, end in zip(batch.sequence_offsets[:-1], batch.sequence_offsets[1:], strict=True):
        assert batch.labels[start : end - 1].tolist() == batch.tokens[start + 1 : end].tolist()
        assert batch.labels[end - 1] == 0 and batch.weights[end - 1] == 0


def test_rows_respect_the_budget_and_a_long_sequence_has_its_own() -> None:
    assert fill_rows([5, 3, 9, 2, 12], 10) == [[4], [2], [0, 1, 3]]


def test_nothing_to_train_has_denominator_one() -> None:
    assert loss_denominator([]) == 1.0
    (batch,) = pack([], 10, 1, 50.0, version=0)
    assert len(batch.tokens) == 0 and batch.row_offsets.tolist() == [0]


def test_a_batch_survives_the_wire_to_the_bit() -> None:
    rng = np.random.default_rng(1)
    for batch in pack([sample_of(rng, 3, 5) for _ in range(7)], 20, 3, 50.0, version=12, last=True):
        again = decode(encode(batch))
        assert (again.version, again.last, again.denominator) == (batch.version, True, batch.denominator)
        for name in (field.name for field in fields(PackedBatch) if field.type == "np.ndarray"):
            left, right = getattr(again, name), getattr(batch, name)
            assert left.dtype == right.dtype and left.tobytes() == right.tobytes()


@pytest.mark.parametrize("body", [b"", b"\x00" * 4, b"\xff" * 64, b"{}" * 20])
def test_bytes_that_are_no_batch_are_refused(body: bytes) -> None:
    with pytest.raises(Exception):  # noqa: B017 - struct, json and safetensors each have their own
        decode(body)


def test_attention_makes_a_long_sequence_dearer_than_its_tokens() -> None:
    assert sequence_costs([10, 100, 0], 50.0).tolist() == [12.0, 300.0, 0.0]
    with pytest.raises(ValueError, match="attention_length 0"):
        sequence_costs([1], 0)


@settings(deadline=None)
@given(st.lists(st.integers(1, 1000), max_size=60), st.integers(1, 9))
def test_every_index_is_in_one_part_and_parts_are_close(costs: list[int], ranks: int) -> None:
    parts = spread(np.array(costs, dtype=np.float64), ranks)
    assert sorted(index for part in parts for index in part) == list(range(len(costs))) and len(parts) == ranks
    sums = [sum(costs[i] for i in part) for part in parts]
    assert max(sums) - min(sums) <= max(costs, default=0)  # joining never widens the largest difference


def test_differencing_beats_giving_the_longest_to_the_idlest() -> None:
    # Largest first gives 8+5+4 and 7+6; differencing leaves 14 and 16.
    costs = np.array([8.0, 7.0, 6.0, 5.0, 4.0])
    assert sorted(costs[part].sum() for part in spread(costs, 2)) == [14.0, 16.0]
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 16000, 512).astype(np.float64)
    sums = [lengths[part].sum() for part in spread(lengths, 16)]
    assert max(sums) / np.mean(sums) < 1.001


def test_one_long_sequence_leaves_ranks_without_one_and_metrics_tell() -> None:
    rng = np.random.default_rng(0)
    batches = pack([sample_of(rng, 5, 95), sample_of(rng, 5, 5)], 40, 3, 50.0, version=0)
    assert sorted(len(batch.tokens) for batch in batches) == [0, 10, 100]
    metrics = pack_metrics(batches, 40, 50.0)
    assert metrics["perf/imbalance"] == pytest.approx(300 / (312 / 3) - 1)
    assert metrics["perf/row_fill"] == pytest.approx(110 / 80)
    assert pack_metrics(pack([], 40, 2, 50.0, version=0), 40, 50.0) == {}
