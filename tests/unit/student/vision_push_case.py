"""Refreshes of a multimodal student: name of the case to family, layout, whether the tower learns, and the way."""

from __future__ import annotations

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any], bool, str]] = {
    "frozen_tp2": ("qwen3_vl", {"tensor_parallel": 2, "sequence_parallel": True}, False, "broadcast"),
    "frozen_pp2": ("qwen2_5_vl", {"pipeline_parallel": 2}, False, "disk"),
    "learning_tp2": ("qwen2_5_vl", {"tensor_parallel": 2}, True, "tensor"),
    "learning_pp2": ("qwen3_vl", {"pipeline_parallel": 2}, True, "broadcast"),
    "learning_dp2": ("qwen3_vl", {"data_parallel": 2}, True, "broadcast"),
}
