"""Options of the recipe with some of them changed."""

from __future__ import annotations

from megatron_opd.config import CalibrationConfig


def changed(options: CalibrationConfig, **values: object) -> CalibrationConfig:
    """A checked copy of ``options`` with other ``values``."""
    return CalibrationConfig(**(options.model_dump() | values))
