"""A multimodal model without its tower."""

from __future__ import annotations

import copy

import torch

_TOWER = "visual"


def without_frozen_tower(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, tensor for tensor, without its vision tower where that does not learn."""
    tower = model._modules.get(_TOWER)
    if tower is None or any(parameter.requires_grad for parameter in tower.parameters()):
        return model
    rest = copy.copy(model)
    rest._modules = {name: module for name, module in model._modules.items() if name != _TOWER}
    return rest
