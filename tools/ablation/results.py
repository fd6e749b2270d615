"""What the runs of the ablation came to: accuracies by part of the toy world, as a table and a figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from toy.world import is_mul_add

from megatron_opd.data.pass_rates import read_pass_rates
from megatron_opd.observe.trajectories import read_trajectories

PARTS = ("math, teacher wrong", "math, teacher right", "code")
COLOURS = ("#d55e00", "#0072b2", "#009e73")  # told apart by colour-blind readers too


@dataclass(frozen=True)
class Outcome:
    """One run."""

    accuracy: dict[str, float]  # of each of PARTS, and "mean" of the two domains
    steps: int
    generated: int  # tokens, for training
    trained: int  # tokens
    auc: float  # of return against outcome before calibration, math, mean over steps


def read_run(folder: Path, prompts: dict[str, str]) -> Outcome:
    """``prompts``: id -> text of the held-out prompts."""
    graded = read_pass_rates(folder / "eval_after.parquet")
    math = np.array([domain == "math" for domain in graded.domains])
    wrong = np.array([is_math and is_mul_add(prompts[i]) for i, is_math in zip(graded.ids, math, strict=True)])
    accuracy = {
        part: float(graded.passes[own].sum() / graded.graded[own].sum())
        for part, own in zip(PARTS, (wrong, math & ~wrong, ~math), strict=True)
    }
    shares = [graded.passes[own].sum() / graded.graded[own].sum() for own in (math, ~math)]
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    aucs = [row["order/auc/math"] for row in metrics if "order/auc/math" in row]
    tokens = summary["tokens"]
    return Outcome(
        accuracy | {"mean": float(np.mean(shares))},
        summary["steps"],
        tokens["sampled"],
        tokens["trained"],
        np.mean(aucs),
    )


def mean_shift(folder: Path) -> float:
    """Mean over all mixed groups of a run of what calibration raised the margin by, nats per token."""
    read = read_trajectories(folder / "trajectories").select(["group", "outcome", "offset", "mean_gap"])
    group, outcome, offset, gap = (read.column(name).to_numpy() for name in read.column_names)
    graded = (outcome >= 0) & np.isfinite(gap)
    shifts = []
    for name in np.unique(group[graded]):
        own = graded & (group == name)
        good, bad = offset[own & (outcome == 1)], offset[own & (outcome == 0)]
        if len(good) and len(bad):
            shifts.append(good.mean() - bad.mean())
    return float(np.mean(shifts))


def table(outcomes: dict[str, list[Outcome]]) -> str:
    """Markdown: mean and standard error over seeds, in percent."""
    head = ["cell", "seeds", *PARTS, "mean of domains", "steps", "tokens generated", "tokens trained", "AUC, math"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for cell, runs in outcomes.items():
        shares = [_percent([run.accuracy[part] for run in runs]) for part in (*PARTS, "mean")]
        sizes = [f"{np.mean([getattr(run, name) for run in runs]):,.0f}" for name in ("steps", "generated", "trained")]
        auc = f"{np.mean([run.auc for run in runs]):.2f}"
        lines.append(f"| {' | '.join([cell, str(len(runs)), *shares, *sizes, auc])} |")
    return "\n".join(lines)


def effects(outcomes: dict[str, list[Outcome]], parts: Sequence[str]) -> str:
    """Markdown: what switching a part on does on average over the four combinations of the other two, in points.

    A difference is taken within each seed; the standard error is that of the seeds' differences. Cells that lack a seed
    shorten the comparison to the seeds that all have.
    """
    seeds = min(len(runs) for runs in outcomes.values())
    head = ["part switched on", *PARTS, "mean of domains"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for part in parts:
        on = [runs for cell, runs in outcomes.items() if cell == "all" or part in cell.split("+")]
        off = [runs for cell, runs in outcomes.items() if not (cell == "all" or part in cell.split("+"))]
        cells = []
        for key in (*PARTS, "mean"):
            means = [
                np.mean([[run.accuracy[key] for run in runs[:seeds]] for runs in side], axis=0) for side in (on, off)
            ]
            cells.append(_percent(means[0] - means[1], sign="+"))
        lines.append(f"| {' | '.join([part, *cells])} |")
    return "\n".join(lines)


def _percent(values: Sequence[float], sign: str = "") -> str:
    error = f" ({100 * np.std(values, ddof=1) / len(values) ** 0.5:.1f})" if len(values) > 1 else ""
    return f"{100 * np.mean(values):{sign}.1f}{error}"


def figure(outcomes: dict[str, list[Outcome]], path: Path) -> None:
    """Accuracy of each cell and part: bars are means, whiskers standard errors, dots single seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axes = pyplot.subplots(figsize=(11, 4.5), layout="constrained")
    width = 0.8 / len(PARTS)
    for number, (part, colour) in enumerate(zip(PARTS, COLOURS, strict=True)):
        values = [[100 * run.accuracy[part] for run in runs] for runs in outcomes.values()]
        places = np.arange(len(values)) + (number - 1) * width
        errors = [np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0.0 for v in values]
        axes.bar(places, [np.mean(v) for v in values], width, yerr=errors, color=colour, label=part, capsize=2)
        for place, own in zip(places, values, strict=True):
            axes.plot([place] * len(own), own, "o", color="black", markersize=2.5, alpha=0.6)
    axes.set_xticks(np.arange(len(outcomes)), [cell.replace(" ", "\n").replace("+", "\n+ ") for cell in outcomes])
    axes.set_ylabel("held-out accuracy after training, %")
    axes.set_ylim(0, 100)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(ncols=len(PARTS), loc="upper center", bbox_to_anchor=(0.5, 1.12), frameon=False)
    canvas.savefig(path, dpi=110)
    pyplot.close(canvas)
