"""The page for Prometheus, read back by Prometheus' own parser, which is in the engine's environment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_opd.observe.metrics import METRICS
from megatron_opd.observe.prometheus import Exposition

PARSER = """
import json, sys
from prometheus_client.parser import text_string_to_metric_families
families = list(text_string_to_metric_families(sys.stdin.read()))
samples = {f.name: [[s.name, s.labels, s.value] for s in f.samples] for f in families}
print(json.dumps({f.name: [f.type, f.documentation, samples[f.name]] for f in families}))
"""
ENGINE_PYTHON = Path(__file__).resolve().parents[3] / ".venv-engine" / "bin" / "python"


def parsed(text: str) -> dict:
    if not ENGINE_PYTHON.is_file():
        pytest.skip("the engine's environment, which has prometheus_client, is not installed")
    done = subprocess.run([ENGINE_PYTHON, "-c", PARSER], input=text, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_gauges_counters_and_labels() -> None:
    page = Exposition()
    page.step(
        1, {"opd/gap": -0.5, "rollout/tokens": 100, "teacher/tokens": 80, "loss/tokens": 70, "teacher/dropped": 2}
    )
    page.step(2, {"opd/gap": -0.25, "opd/gap/math": float("nan"), 'opd/gap/a"\\\nb': 1.5, "rollout/tokens": 50})
    page.step(2, {"eval/after/math": 0.5, "own/new-name": 3})
    found = parsed(page.text(refreshes=3, version=2))
    kind, help_text, samples = found["megatron_opd_opd_gap"]
    assert (kind, help_text) == ("gauge", f"{METRICS['opd/gap'].meaning} (nats per token).")
    assert samples[0] == ["megatron_opd_opd_gap", {}, -0.25]
    assert samples[1][1] == {"domain": "math"} and samples[1][2] != samples[1][2]
    assert samples[2][1:] == [{"domain": 'a"\\\nb'}, 1.5]
    assert found["megatron_opd_eval_after"][2] == [["megatron_opd_eval_after", {"domain": "math"}, 0.5]]
    assert found["megatron_opd_own_new_name"][2][0][2] == 3
    counters = {name: family[2][0][2] for name, family in found.items() if family[0] == "counter"}
    assert counters == {
        "megatron_opd_weight_refreshes": 3,
        "megatron_opd_generated_tokens": 150,
        "megatron_opd_scored_tokens": 80,
        "megatron_opd_trained_tokens": 70,
        "megatron_opd_dropped_rollouts": 2,
    }
    assert found["megatron_opd_step"][2][0][2] == 2 and found["megatron_opd_weight_version"][2][0][2] == 2


def test_a_run_without_a_step_has_a_page() -> None:
    found = parsed(Exposition().text(refreshes=0, version=None))
    assert found["megatron_opd_step"][2] == [["megatron_opd_step", {}, 0]]
    assert "megatron_opd_weight_version" not in found
