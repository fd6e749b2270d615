"""Which processes of a run go to which nodes of an allocation: arithmetic alone, before anything starts.

A unit is what a rank needs: a GPU, or, where the nodes have none, a processor. The student may span nodes and then has
as many ranks on each; every server stays on one node. Places are given in order of size, each on the first node with
room, so that the same config and allocation give the same placement.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_opd.errors import ConfigError, OpdError, raise_together
from megatron_opd.runtime.slurm import Node


@dataclass(frozen=True)
class Demand:
    """What one process group needs."""

    role: str
    units: int  # GPUs, or processors where nodes have no GPU
    spans_nodes: bool = False


@dataclass(frozen=True)
class Place:
    """Where it runs."""

    nodes: tuple[Node, ...]
    gpus: tuple[int, ...]  # numbers of its GPUs, the same on each of its nodes; empty on nodes without any

    @property
    def address(self) -> str:
        """Where others reach it: its first node."""
        return self.nodes[0].address

    def told(self) -> str:
        """For a person."""
        gpus = f", GPUs {','.join(map(str, self.gpus))}" if self.gpus else ""
        return ", ".join(f"{node.name} ({node.address})" for node in self.nodes) + gpus


def place(demands: Sequence[Demand], nodes: Sequence[Node]) -> dict[str, Place]:
    """A place for each role. Raises ConfigError that names every role without one, with both numbers."""
    on_gpus = any(node.gpus for node in nodes)
    taken = dict.fromkeys(nodes, 0)
    places: dict[str, Place] = {}
    lacking: list[OpdError] = []
    # The student first: it needs the emptiest nodes. Then the largest server, which fits the fewest.
    for demand in sorted(demands, key=lambda one: (not one.spans_nodes, -one.units)):
        found, share = _first_fit(demand, taken, on_gpus)
        if found:
            first = taken[found[0]]
            places[demand.role] = Place(found, tuple(range(first, first + share)) if on_gpus else ())
            taken |= {node: taken[node] + share for node in found}
        else:
            lacking.append(_no_room(demand, taken, on_gpus))
    raise_together(lacking)
    return places


def _first_fit(demand: Demand, taken: dict[Node, int], on_gpus: bool) -> tuple[tuple[Node, ...], int]:
    """The fewest nodes that hold the demand in equal shares, and the share; no nodes when there are none."""
    for count in range(1, len(taken) + 1 if demand.spans_nodes else 2):
        share = demand.units // count
        if share * count != demand.units:
            continue
        # Several nodes must be empty: GPUs of a role have the same numbers on each of them.
        fitting = [
            node
            for node, used in taken.items()
            if _capacity(node, on_gpus) - used >= share and (count == 1 or used == 0)
        ]
        if len(fitting) >= count:
            return tuple(fitting[:count]), share
    return (), 0


def _capacity(node: Node, on_gpus: bool) -> int:
    return node.gpus if on_gpus else node.cpus


def _no_room(demand: Demand, taken: dict[Node, int], on_gpus: bool) -> ConfigError:
    unit = "GPUs" if on_gpus else "processors"
    free = ", ".join(f"{node.name} {_capacity(node, on_gpus) - used}" for node, used in taken.items())
    where = "in equal shares on nodes" if demand.spans_nodes else "on one node"
    return ConfigError(
        f"{demand.role} does not fit into the allocation",
        where="SLURM's allocation",
        got=f"free {unit}: {free}",
        expected=f"{demand.units} {unit} {where}",
        fix="ask for more or larger nodes, or lower the role's parallel sizes and replicas",
    )
