"""Model families that mbridge does not know by name, and its export without an exchange that has no partner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mbridge.core import bridge, register_model
from mbridge.core.util import broadcast_from_megatron_pp, broadcast_str_from_megatron_pp
from mbridge.models.llama import LLaMABridge
from megatron.core import parallel_state


class MistralBridge(LLaMABridge):
    """Mistral's weights have Llama's names and shapes; its sliding window is refused in ``sizes`` where it matters."""


def register() -> None:
    """Make mbridge's AutoBridge know them."""
    register_model("mistral")(MistralBridge)
    # For each tensor of an export mbridge asks all pipeline stages who has it, pickled, also where there is one stage:
    # three quarters of the time that an export takes there (docs/refresh.md).
    bridge.broadcast_from_megatron_pp = _unless_one_stage(broadcast_from_megatron_pp)
    bridge.broadcast_str_from_megatron_pp = _unless_one_stage(broadcast_str_from_megatron_pp)


def _unless_one_stage(exchange: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def exchanged(value: Any) -> Any:
        return value if parallel_state.get_pipeline_model_parallel_world_size() == 1 else exchange(value)

    return exchanged
