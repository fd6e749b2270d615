"""Parts of the multimodal model that the CPU tests of whole models cannot reach."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_opd.student.vision.packing import VisionPacking
from megatron_opd.student.vision.rotary import Rotary, turning
from megatron_opd.student.vision.tower import tower_features


class Attention(torch.nn.Module):
    """A core attention with the arguments of Transformer Engine's, that tells what it is given."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        num_splits: int | None = None,
    ) -> tuple[Any, ...]:
        return query, key, value, attention_mask, attn_mask_type, packed_seq_params


def test_any_core_attention_is_given_turned_queries_and_keys() -> None:
    query, key, value = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(3, 1, 8)
    rotary = Rotary(8, 100.0, [2, 1, 1], interleaved=False)(torch.tensor([[0, 1, 2]] * 3), torch.float32)
    packing = VisionPacking(rotary=rotary)
    found = turning(Attention)()(query, key, value, None, attn_mask_type="causal", packed_seq_params=packing)
    for turned, plain in zip(found[:2], (query, key), strict=True):
        torch.testing.assert_close(turned[0], plain[0])  # position 0
        assert not torch.allclose(turned[1:], plain[1:])
        torch.testing.assert_close(turned.norm(dim=-1), plain.norm(dim=-1))
    assert found[2] is value
    assert found[3:] == (None, "causal", packing)
    assert turning(Attention) is turning(Attention)


def test_attention_without_angles_is_an_error() -> None:
    attention = turning(Attention)()
    for packing in (None, PackedSeqParams(), VisionPacking()):
        with pytest.raises(TypeError, match="without angles"):
            attention(*[torch.zeros(1, 1, 2)] * 3, None, attn_mask_type=None, packed_seq_params=packing)


@pytest.mark.parametrize(
    ("output", "levels"),
    [
        (lambda hidden: hidden, 0),
        (lambda hidden: (hidden, [2 * hidden, 3 * hidden]), 2),
        (lambda hidden: types.SimpleNamespace(pooler_output=hidden, last_hidden_state=None), 0),
        (lambda hidden: types.SimpleNamespace(pooler_output=hidden, deepstack_features=[2 * hidden]), 1),
    ],
    ids=["transformers 4, Qwen2.5", "transformers 4, Qwen3", "transformers 5, Qwen2.5", "transformers 5, Qwen3"],
)
def test_features_of_towers_of_either_transformers(output: Any, levels: int) -> None:
    class Tower(torch.nn.Linear):
        def forward(self, hidden: torch.Tensor, grid_thw: torch.Tensor) -> Any:
            assert grid_thw.tolist() == [[1, 2, 2]]
            return output(super().forward(hidden))

    tower = Tower(3, 5, dtype=torch.bfloat16)
    patches = torch.ones(4, 3)
    found = tower_features(tower, patches, torch.tensor([[1, 2, 2]]))
    assert len(found) == 1 + levels
    for factor, part in enumerate(found, start=1):
        torch.testing.assert_close(part, factor * torch.nn.functional.linear(patches.bfloat16(), *tower.parameters()))
