"""Transformer layers in plain PyTorch, with the parameter names of Transformer Engine.

Megatron-Core's own layers without Transformer Engine lack what distillation needs: its RMSNorm refuses sequence
parallelism and its attention refuses packed rows. The three modules below fill that gap; the matrices, the
communication and the layer itself stay Megatron's. Because the norm in front of a matrix is a parameter of the
matrix's module (``linear_qkv.layer_norm_weight``), as in Transformer Engine, weights move between both backends.

Shapes: T tokens of a row, B sequences, N query heads and G key-value heads of this rank, D size of a head.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch.nn import functional

from megatron_opd.student.context import positions_of_rank
from megatron_opd.student.torch_experts import grouped_experts


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm over the last dimension."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _norm_weight(config, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape."""
        return functional.rms_norm(hidden, self.weight.shape, self.weight, self.eps)


class NormColumnParallelLinear(ColumnParallelLinear):
    """RMSNorm and then a matrix split by columns: Transformer Engine's LayerNormColumnParallelLinear."""

    def __init__(self, input_size: int, output_size: int, *, config: TransformerConfig, **options: Any) -> None:
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = _norm_weight(config, input_size)

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[T, B, input_size] -> [T, B, output_size / tensor parallel] and the bias that the caller adds, if any."""
        weight = self.layer_norm_weight
        normed = functional.rms_norm(hidden, weight.shape, weight, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


class CausalAttention(torch.nn.Module):
    """Causal attention by PyTorch's fused kernel, for batches ("sbhd") and for packed rows ("thd")."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1 / math.sqrt(config.kv_channels)
        self.context = parallel_state.get_context_parallel_group() if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Packed: query [T, N, D], key and value [T, G, D] -> [T, N * D]. Else [T, B, ...] -> [T, B, N * D].

        ``attention_mask`` is not read: the mask is causal within each sequence.
        """
        if packed_seq_params is None:
            return self._attend(query, key, value).flatten(2)
        if self.context is not None:
            return self._attend_to_all_ranks(query, key, value, packed_seq_params.cu_seqlens_q.cpu().numpy())
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        rows = [tensor.unsqueeze(1) for tensor in (query, key, value)]
        parts = [self._attend(*(row[start:end] for row in rows)) for start, end in itertools.pairwise(bounds)]
        return torch.cat(parts).flatten(1)

    def _attend_to_all_ranks(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: np.ndarray
    ) -> torch.Tensor:
        """This context-parallel rank's queries [T / R, N, D] against the keys of all R -> [T / R, N * D].

        bounds [S + 1]: where the sequences of the whole row start and end. Each rank gathers all keys and values, whose
        gradients the gathering sums on the way back.
        """
        ranks, rank = self.context.size(), self.context.rank()
        held = np.concatenate([positions_of_rank(bounds, ranks, other) for other in range(ranks)])
        order = torch.from_numpy(np.argsort(held)).to(query.device)
        key, value = (
            gather_from_sequence_parallel_region(tensor.contiguous(), group=self.context)[order].unsqueeze(1)
            for tensor in (key, value)
        )
        positions = torch.from_numpy(positions_of_rank(bounds, ranks, rank)).to(query.device)
        parts = []
        for start, end in itertools.pairwise(bounds.tolist()):
            mine = slice(start // ranks, end // ranks)
            causal = positions[mine, None] >= torch.arange(start, end, device=query.device)
            parts.append(self._attend(query[mine].unsqueeze(1), key[start:end], value[start:end], causal))
        return torch.cat(parts).flatten(1)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[T, B, heads, D] each -> [T, B, N, D]. mask [queries, keys]: true where one sees the other; None: causal."""
        batch_first = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        attended = functional.scaled_dot_product_attention(
            *batch_first, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return attended.permute(2, 0, 1, 3)


class TorchSpecProvider(LocalSpecProvider):
    """Megatron's own matrices, with the modules above where it has none that fit."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormColumnParallelLinear

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        return RMSNorm

    def core_attention(self) -> type:
        return CausalAttention

    def grouped_mlp_modules(
        self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool
    ) -> tuple[type, MLPSubmodules]:
        return grouped_experts()


def decoder_spec(config: TransformerConfig, part: int | None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the norm after the last one. part: virtual stage; None without any."""
    backend = TorchSpecProvider()
    head_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_layer_norm_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    layer = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,
            # A dense layer's norm belongs to its first matrix, that of a mixture of experts feeds the router too.
            pre_mlp_layernorm=IdentityOp if config.num_moe_experts is None else backend.layer_norm(),
            mlp=get_mlp_module_spec_for_backend(backend, config.num_moe_experts, moe_grouped_gemm=True),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage=part), layer_norm=backend.layer_norm()
    )


def _norm_weight(config: TransformerConfig, size: int) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype, device=torch.cuda.current_device()))
    # Each rank sees some of the tokens only: tells Megatron to sum this gradient over tensor-parallel ranks.
    weight.sequence_parallel = config.sequence_parallel
    return weight
