"""Placement of roles on nodes."""

from __future__ import annotations

import pytest

from megatron_opd.errors import ConfigError
from megatron_opd.runtime.slurm import Node
from megatron_opd.train.placement import Demand, place


def gpu_nodes(*counts: int) -> list[Node]:
    return [Node(f"n{number}", f"10.0.0.{number}", 96, gpus) for number, gpus in enumerate(counts, 1)]


def names(place_: object) -> list[str]:
    return [node.name for node in place_.nodes]


def test_the_student_spans_whole_nodes_and_servers_fill_the_others() -> None:
    demands = [Demand("teacher-math", 4), Demand("student", 16, spans_nodes=True), Demand("rollout", 8)]
    found = place([*demands, Demand("teacher-code", 4)], gpu_nodes(8, 8, 8, 8))
    assert names(found["student"]) == ["n1", "n2"]
    assert found["student"].gpus == tuple(range(8))
    assert names(found["rollout"]) == ["n3"]
    assert (names(found["teacher-math"]), found["teacher-math"].gpus) == (["n4"], (0, 1, 2, 3))
    assert (names(found["teacher-code"]), found["teacher-code"].gpus) == (["n4"], (4, 5, 6, 7))
    assert found["student"].address == "10.0.0.1"


def test_no_gpu_is_given_twice() -> None:
    sizes = [1, 3, 2, 2, 4, 1, 2]
    found = place([Demand(f"r{i}", size) for i, size in enumerate(sizes)], gpu_nodes(8, 8))
    given = [(names(one)[0], gpu) for one in found.values() for gpu in one.gpus]
    assert len(given) == len(set(given)) == sum(sizes)


def test_a_student_that_fills_no_node_shares_it() -> None:
    found = place([Demand("student", 2, spans_nodes=True), Demand("rollout", 2)], gpu_nodes(4))
    assert found["student"].gpus == (0, 1)
    assert found["rollout"].gpus == (2, 3)


def test_a_student_larger_than_a_node_has_equal_shares() -> None:
    found = place([Demand("student", 12, spans_nodes=True)], gpu_nodes(8, 8))
    assert names(found["student"]) == ["n1", "n2"]
    assert found["student"].gpus == tuple(range(6))


def test_nodes_without_gpus_are_filled_by_processors() -> None:
    nodes = [Node(name, "127.0.0.1", 2, 0) for name in ("n1", "n2", "n3")]
    demands = [Demand("student", 2, spans_nodes=True), Demand("rollout", 1), Demand("teacher-math", 1)]
    found = place([*demands, Demand("teacher-code", 1)], nodes)
    assert [names(found[role]) for role in ("student", "rollout", "teacher-math", "teacher-code")] == [
        ["n1"],
        ["n2"],
        ["n2"],
        ["n3"],
    ]
    assert all(one.gpus == () for one in found.values())


def test_every_role_without_room_is_named_with_both_numbers() -> None:
    demands = [Demand("student", 16, spans_nodes=True), Demand("teacher-math", 16), Demand("rollout", 8)]
    with pytest.raises(ConfigError) as raised:
        place(demands, gpu_nodes(8, 8))
    told = str(raised.value)
    assert "teacher-math does not fit" in told and "16 GPUs on one node" in told
    assert "rollout does not fit" in told and "free GPUs: n1 0, n2 0" in told
    assert "student does not fit" not in told


def test_a_student_that_divides_over_no_number_of_nodes_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"13 GPUs in equal shares"):
        place([Demand("student", 13, spans_nodes=True)], gpu_nodes(8, 8))
