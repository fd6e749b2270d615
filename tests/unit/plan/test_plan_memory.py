"""What a plan says of memory against real Megatron ranks, by the tool that makes the table of docs/plan.md."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LAYOUTS = ("one_bf16", "one_selective", "one_full", "tp2_sequence", "pp2_virtual2", "cp2", "experts_ep2_pp2_full")


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, dict[str, float]]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/plan_check.py", "--json", "--only", ",".join(LAYOUTS)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_and_optimizer_are_exact_and_gradients_but_for_padding(layout: str, found: dict) -> None:
    parts = found[layout]
    for part in ("weights", "optimizer"):
        assert parts[part]["planned"] == parts[part]["measured"], part
    assert 0.998 <= parts["gradients"]["planned"] / parts["gradients"]["measured"] <= 1


@pytest.mark.parametrize("part", ["activations", "both passes"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_and_peak_are_within_15_percent(layout: str, part: str, found: dict) -> None:
    sizes = found[layout][part]
    assert 0.85 <= sizes["planned"] / sizes["measured"] <= 1.15
