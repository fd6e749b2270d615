"""The slicing for context parallelism, against the documented example and a slow formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_opd.student.context import lengthen, positions_of_rank

LENGTHS = [[7, 12, 5], [1], [4, 8], [3, 1, 2, 30]]


def bounds_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths])


def test_documented_example() -> None:
    bounds = bounds_of([4, 8])
    assert positions_of_rank(bounds, 2, 0).tolist() == [0, 3, 4, 5, 10, 11]
    assert positions_of_rank(bounds, 2, 1).tolist() == [1, 2, 6, 7, 8, 9]


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_each_sequence_gives_each_rank_an_early_and_a_late_chunk(lengths: list[int], ranks: int) -> None:
    bounds, _, _ = lengthen(bounds_of(lengths), 2 * ranks, 2 * ranks)
    found = [positions_of_rank(bounds, ranks, rank).tolist() for rank in range(ranks)]
    for rank in range(ranks):
        expected = []
        for start, end in itertools.pairwise(bounds):
            chunks = np.arange(start, end).reshape(2 * ranks, -1)
            expected += [*chunks[rank], *chunks[2 * ranks - 1 - rank]]
        assert found[rank] == expected
    assert sorted(itertools.chain(*found)) == list(range(bounds[-1]))


@pytest.mark.parametrize("multiples", [(1, 1), (1, 4), (4, 4), (4, 8), (6, 12)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_a_longer_row_holds_every_token_once_and_in_order(lengths: list[int], multiples: tuple[int, int]) -> None:
    bounds, origins, places = lengthen(bounds_of(lengths), *multiples)
    longer = np.diff(bounds)
    assert not (longer % multiples[0]).any() and bounds[-1] % multiples[1] == 0
    assert origins[origins >= 0].tolist() == list(range(sum(lengths)))
    for number, length in enumerate([*lengths, 0][: len(longer)]):
        inside = slice(bounds[number], bounds[number + 1])
        assert places[inside].tolist() == list(range(longer[number]))
        assert (origins[inside] >= 0).tolist() == [place < length for place in range(longer[number])]


def test_nothing_is_added_where_nothing_is_missing() -> None:
    bounds, origins, _ = lengthen(bounds_of([4, 8]), 4, 4)
    assert bounds.tolist() == [0, 4, 12] and origins.tolist() == list(range(12))
