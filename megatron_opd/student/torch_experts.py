"""The matrices of a mixture of experts in plain PyTorch, with the parameter names of Transformer Engine.

Megatron's ``TEGroupedMLP`` asks for nothing of Transformer Engine but two modules that multiply the tokens of each
expert with that expert's matrix. These are the two: ``linear_fc1.weight0``, ``linear_fc1.weight1`` and so on, one
matrix for each expert of this rank, numbered from 0. Which rank sees which token is the dispatcher's business; here no
rank talks to another.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import divide
from torch.nn import functional


class _ExpertMatrices(torch.nn.Module):
    """E matrices [output, input], each split over the expert-tensor-parallel ranks along ``split`` (0 or 1)."""

    split: int

    def __init__(
        self,
        experts: int,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.experts = experts
        self._groups = pg_collection
        shape = [output_size, input_size]
        shape[self.split] = divide(shape[self.split], pg_collection.expt_tp.size())
        for expert in range(experts):
            weight = torch.nn.Parameter(
                torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device())
            )
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=self.split, stride=1)
            # Experts that are spread over ranks are summed over other ranks than the dense weights.
            weight.allreduce = config.expert_model_parallel_size == 1
            self.register_parameter(f"weight{expert}", weight)

    def forward(self, tokens: torch.Tensor, counts: list[int]) -> tuple[torch.Tensor, None]:
        """tokens [T, input], those of one expert after those of another; counts [E] of each -> [T, output], no bias."""
        parts = tokens.split(counts)
        weights = (getattr(self, f"weight{expert}") for expert in range(self.experts))
        return torch.cat([functional.linear(*pair) for pair in zip(parts, weights, strict=True)]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """The matrices for Megatron's checkpoints: one tensor over all experts, as Transformer Engine's are."""
        first = self._groups.ep.rank() * self.experts
        whole = self._groups.ep.size() * self.experts
        found = {}
        for expert in range(self.experts):
            offsets = (*sharded_offsets, (len(sharded_offsets), first + expert, whole))
            (tensor,) = make_sharded_tensors_for_checkpoint(
                {"weight": getattr(self, f"weight{expert}")},
                prefix,
                {"weight": self.split},
                offsets,
                tp_group=self._groups.expt_tp,
                dp_cp_group=metadata["dp_cp_group"],
            ).values()
            # Equal copies are those with the same experts.
            tensor.replica_id = (*tensor.replica_id[:2], self._groups.expt_dp.rank())
            found[f"{prefix}weight{expert}"] = tensor
        return found


class ColumnExpertMatrices(_ExpertMatrices):
    """Gate and up matrices, split by columns of the output."""

    split = 0


class RowExpertMatrices(_ExpertMatrices):
    """Down matrices, split by rows of the input."""

    split = 1


def grouped_experts() -> tuple[type, MLPSubmodules]:
    """Module of the experts of one rank, and its submodules."""
    return TEGroupedMLP, MLPSubmodules(linear_fc1=ColumnExpertMatrices, linear_fc2=RowExpertMatrices)
