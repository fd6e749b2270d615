"""The end of the model: hidden states out of GPTModel, log-probs out of hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import unwrap_model

from megatron_opd.student.fused_logprob import Loss, hidden_logprobs, hidden_loss


def return_hidden_states(model: GPTModel) -> GPTModel:
    """Make ``model`` return what its output layer is given, [B, T, H]; with sequence parallelism this rank's part of T.

    The output layer stays where it is, with its weight: names in checkpoints and the hooks that run before a layer's
    forward pass are as before. Does nothing on a pipeline stage without an output layer.
    """
    if model.post_process:
        model.output_layer.forward = _pass_on
    return model


def _pass_on(hidden: torch.Tensor, **unused: Any) -> tuple[torch.Tensor, None]:
    return hidden, None


@dataclass(frozen=True, slots=True)
class Head:
    """The output layer of a model whose output is hidden states. Only the last pipeline stage may use it."""

    model: torch.nn.Module  # GPTModel, maybe wrapped
    vocab_size: int

    def logprobs(self, hidden: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """The model's output for one row, [1, T, H] or a rank's part of it -> log-probs of ``ids`` [T, C]."""
        logprobs, _ = hidden_logprobs(hidden.squeeze(0), self._weight(), ids, self.vocab_size, **self._split())
        return logprobs

    def loss(self, hidden: torch.Tensor, ids: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor]:
        """``loss`` of these log-probs, to be differentiated, and the log-probs, without gradient."""
        return hidden_loss(hidden.squeeze(0), self._weight(), ids, loss, self.vocab_size, **self._split())

    def _weight(self) -> torch.Tensor:
        """[V / tp, H]."""
        model = unwrap_model(self.model)
        shared = model.share_embeddings_and_output_weights
        return model.shared_embedding_or_output_weight() if shared else model.output_layer.weight

    def _split(self) -> dict[str, Any]:
        """How the vocabulary, and the positions, lie on the ranks."""
        return {
            "group": parallel_state.get_tensor_model_parallel_group(),
            "sequence_parallel": unwrap_model(self.model).config.sequence_parallel,
        }
