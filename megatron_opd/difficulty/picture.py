"""The histograms before and after weighing, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_opd.difficulty.weighing import DomainWeights, name_of, raised_bins

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, AFTER = "#0072B2", "#E69F00"  # blue and orange of Okabe and Ito, which colour-blind people tell apart
WIDTH = 0.4  # of a bar; a pass count has room for 1


def draw_histograms(path: Path, rows: Sequence[DomainWeights], title: str) -> None:
    """A panel for each domain; the picture appears when it is complete."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    bins = max(len(row.counts) for row in rows)
    width = max(6.5, 2.0 + 0.5 * bins)
    figure = Figure(figsize=(width * min(2, len(rows)), 4.2 * -(-len(rows) // 2)), layout="constrained")
    panels = figure.subplots(-(-len(rows) // 2), min(2, len(rows)), squeeze=False).ravel()
    for panel, row in zip(panels, rows, strict=False):
        _panel(panel, row)
    for panel in panels[len(rows) :]:
        panel.set_visible(False)
    figure.suptitle(title, fontsize=11)
    temporary = path.with_name(f"{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.rename(path)


def _panel(panel: Axes, row: DomainWeights) -> None:
    passes = np.arange(len(row.counts))
    samples = len(row.counts) - 1
    before = panel.bar(passes - WIDTH / 2, row.counts, WIDTH, color=BEFORE, label="prompts")
    after = panel.bar(
        passes + WIDTH / 2, row.appearances, WIDTH, color=AFTER, hatch="///", edgecolor="white", linewidth=0
    )
    after.set_label("appearances in one epoch")
    if samples <= 16:
        for bars in (before, after):
            panel.bar_label(bars, fontsize=7, padding=1)
    alone = f"; {row.left_alone} with unknown outcomes left alone" if row.left_alone else ""
    panel.set_title(f"{row.domain}: {name_of(row.shape)}, {raised_bins(row.raised)}{alone}", fontsize=10)
    panel.set_xlabel(f"passes c of {samples} samples (hard to easy)")
    panel.set_ylabel("prompts, appearances")
    panel.set_xticks(passes if samples <= 32 else passes[:: samples // 16])
    panel.margins(y=0.12)
    panel.grid(axis="y", alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=8)
