"""Where broadcast weights are received in an SGLang that the launcher started: only where loading is a plain copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import nn

from megatron_opd.engines import sglang_receiver
from megatron_opd.engines.sglang_receiver import Places
from megatron_opd.engines.weights import STREAM, STREAM_MARK

Named = list[tuple[str, torch.Tensor]]
SHAPES = {"q": (4, 3), "k": (2, 3), "embed": (5, 3), "norm": (3,)}


class Model(nn.Module):
    """Loads as SGLang's models do: a fused parameter, and an embedding with rows of padding."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(6, 3))
        self.embed = nn.Parameter(torch.ones(8, 3))
        self.norm = nn.Parameter(torch.zeros(3))

    def load(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            if name == "q":
                self.fused.data.narrow(0, 0, 4).copy_(tensor)
            elif name == "k":
                self.fused.data[4:].copy_(tensor)
            elif name == "embed":
                self.embed.data[: len(tensor)].copy_(tensor)
                self.embed.data[len(tensor) :].fill_(0)
            else:
                self.norm.data.copy_(tensor)


def tensors(**shapes: tuple[int, ...]) -> Named:
    return [(name, torch.randn(shape)) for name, shape in shapes.items()]


def places_of(places: Places, named: Named) -> list[torch.Tensor | None]:
    return places.of(*zip(*((name, tensor.dtype, tensor.shape) for name, tensor in named), strict=True))


def test_after_the_first_load_a_tensor_is_received_where_loading_has_put_it() -> None:
    model, sent = Model(), tensors(**SHAPES)
    places = Places(model)
    assert places_of(places, sent) == [None] * 4
    places.load(sent, model.load)
    for (_, tensor), place in zip(tensors(**SHAPES), places_of(places, sent), strict=True):
        place.copy_(tensor)
        sent.append(("", tensor))
    q, k, embed, norm = (tensor for _, tensor in sent[4:])
    assert torch.equal(model.fused, torch.cat([q, k])) and torch.equal(model.norm, norm)
    assert torch.equal(model.embed[:5], embed) and not model.embed[5:].any()


def shard(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:2].copy_(tensor[2:])


def transposed(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:3].copy_(tensor[:3].T)


def shifted(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:4].copy_(tensor).add_(1)


def doubled_before(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:4].copy_(tensor.mul_(2))


def twice(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:4].copy_(tensor)
    model.embed.data[:4].copy_(tensor)


def also_read(model: Model, tensor: torch.Tensor) -> None:
    model.fused.data[:4].copy_(tensor)
    model.norm.data.copy_(tensor.sum(0))


def replaced(model: Model, tensor: torch.Tensor) -> None:
    model.fused = nn.Parameter(tensor)


@pytest.mark.parametrize("load", [shard, transposed, shifted, doubled_before, twice, also_read, replaced])
def test_what_is_more_than_a_copy_has_no_place(load: Callable[[Model, torch.Tensor], None]) -> None:
    model, sent = Model(), tensors(q=(4, 3))
    places = Places(model)
    for _ in range(2):
        places.load(sent, lambda named: load(model, named[0][1]))
    assert places_of(places, sent) == [None]


def test_a_parameter_that_was_replaced_and_a_tensor_of_another_shape_lose_their_place() -> None:
    model, sent = Model(), tensors(norm=(3,), q=(4, 3))
    places = Places(model)
    places.load(sent, model.load)
    model.norm = nn.Parameter(torch.zeros(3))
    assert places_of(places, tensors(norm=(3,), q=(2, 3))) == [None, None]


def test_both_ends_have_the_same_mark() -> None:
    assert (sglang_receiver.MARK, sglang_receiver.STREAM) == (STREAM_MARK, STREAM)
