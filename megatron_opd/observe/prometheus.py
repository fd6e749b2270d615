"""The numbers of a run in Prometheus' text format, for the coordinator's ``/metrics``.

Each metric of ``metrics.jsonl``, and each accuracy, is a gauge with its newest value: ``opd/gap/math`` is
``megatron_opd_opd_gap{domain="math"}``. Counters count since this process started, as Prometheus expects.

Format: https://prometheus.io/docs/instrumenting/exposition_formats, text version 0.0.4.
"""

from __future__ import annotations

import re
from collections import Counter

from megatron_opd.observe.metrics import METRICS, split_name

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIX = "megatron_opd_"
COUNTED = {  # counter: the metric that it sums, and what it is
    "generated_tokens_total": ("rollout/tokens", "Tokens sampled for training."),
    "scored_tokens_total": ("teacher/tokens", "Response tokens that teachers scored."),
    "trained_tokens_total": ("loss/tokens", "Tokens with a weight in the loss."),
    "dropped_rollouts_total": ("teacher/dropped", "Rollouts lost to failed teacher calls."),
}


class Exposition:
    """Remembers the newest step and sums what is counted: a listener of the recorder."""

    def __init__(self) -> None:
        self._step, self._metrics = 0, dict[str, float]()
        self._counts: Counter[str] = Counter()

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of a finished step, or of an evaluation after it."""
        self._step = step
        self._metrics |= metrics
        for name, (source, _) in COUNTED.items():
            self._counts[name] += metrics.get(source, 0)

    def text(self, refreshes: int, version: int | None) -> str:
        """The page. refreshes: so far; version: optimizer steps behind the live weights, None before there are any."""
        lines = _family("step", "gauge", "Newest finished optimizer step.", {"": self._step})
        if version is not None:
            lines += _family("weight_version", "gauge", "Optimizer steps behind the engine's weights.", {"": version})
        lines += _family("weight_refreshes_total", "counter", "Refreshes of the engine's weights.", {"": refreshes})
        for name, (_, meaning) in COUNTED.items():
            lines += _family(name, "counter", meaning, {"": self._counts[name]})
        for name, values in self._by_metric().items():
            known = METRICS.get(name)
            meaning = f"{known.meaning} ({known.unit})." if known else f"{name} of the newest step."
            lines += _family(re.sub(r"[^A-Za-z0-9_]", "_", name), "gauge", meaning, values)
        return "\n".join(lines) + "\n"

    def _by_metric(self) -> dict[str, dict[str, float]]:
        """Each metric with its values by label: "" overall, '{domain="math"}' of a domain."""
        found: dict[str, dict[str, float]] = {}
        for name, value in self._metrics.items():
            metric, domain = split_name(name)
            label = "" if domain is None else f'{{domain="{_escaped(domain)}"}}'
            found.setdefault(metric, {})[label] = value
        return found


def _family(name: str, kind: str, meaning: str, values: dict[str, float]) -> list[str]:
    full = PREFIX + name
    lines = [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}"]
    return lines + [f"{full}{label} {float(value)!r}" for label, value in values.items()]


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
