"""Model families that mbridge does not know by name."""

from __future__ import annotations

from mbridge.core import register_model
from mbridge.models.llama import LLaMABridge


class MistralBridge(LLaMABridge):
    """Mistral's weights have Llama's names and shapes; its sliding window is refused in ``sizes`` where it matters."""


def register() -> None:
    """Make mbridge's AutoBridge know them."""
    register_model("mistral")(MistralBridge)
