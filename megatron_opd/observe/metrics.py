"""Every number of ``metrics.jsonl``: what it means, how to read it, and what to do about it.

A name is ``group/name``, or ``group/name/<domain>`` for the same number of one domain alone. docs/operations.md, the
Prometheus help texts and the report are made from this table.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_opd.observe import metrics_recipe, metrics_run

GROUPS = {
    "loss": "what the optimizer sees",
    "opd": "the distillation signal, token by token",
    "reward": "outcomes of the verifiers",
    "rollout": "what the student writes",
    "teacher": "scoring",
    "balance": "what online balancing does",
    "order": "whether the teacher prefers right to wrong rollouts, before calibration",
    "calibration": "what margin calibration does",
    "refresh": "new weights for the rollout engine",
    "perf": "speed and how evenly work is spread",
    "time": "where the seconds of a step go",
    "eval": "accuracy on held-out prompts; not in metrics.jsonl, but in the sinks and /metrics",
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One number of a step."""

    meaning: str  # one sentence
    unit: str  # "share": between 0 and 1
    reading: str  # what is usual, and what a change tells
    action: str  # what to do when it looks wrong

    @property
    def is_share(self) -> bool:
        """Shown as a percentage."""
        return self.unit == "share"


METRICS = {name: Metric(*texts) for name, texts in (metrics_run.TEXTS | metrics_recipe.TEXTS).items()}


def split_name(name: str) -> tuple[str, str | None]:
    """The metric and the domain of a name of metrics.jsonl: "opd/gap/math" is ("opd/gap", "math")."""
    group, _, rest = name.partition("/")
    short, _, domain = rest.partition("/")
    return f"{group}/{short}", domain or None


def metrics_table() -> str:
    """The registry as Markdown: a table for each group."""
    parts = []
    for group, meaning in GROUPS.items():
        rows = [(name, metric) for name, metric in METRICS.items() if name.startswith(f"{group}/")]
        parts.append(
            f"### `{group}/`: {meaning}\n\n| metric | meaning | how to read it | what to do |\n|---|---|---|---|"
        )
        parts[-1] += "".join(
            f"\n| `{name}` | {metric.meaning} ({metric.unit}) | {metric.reading} | {metric.action} |"
            for name, metric in rows
        )
    return "\n\n".join(parts)
