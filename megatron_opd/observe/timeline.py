"""When the parts of a step happened, for the report's picture of a step: an event a step, of bounded size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_opd.observe.recorder import Recorder

GROUPS_SHOWN = 64  # of a step; more are thinned out, the first and the last to be ready are kept
GROUP_MARKS = ("began", "generated", "verified", "asked", "scored")
"""Moments of one group; between verified and asked it waits for what is balanced together with it."""


def record_timeline(
    recorder: Recorder,
    step: int,
    groups: Sequence[tuple[float, ...]],
    *,
    began: float,
    offered: float,
    live: float,
    train_s: float,
    refresh_s: float,
) -> None:
    """Leave an event ``timeline``: all moments in seconds since ``began``, which is a time of the system's clock.

    groups: as GROUP_MARKS; offered: when the batch was; live: when the next weights were reported as live, which ends
    ``refresh_s`` of refresh after ``train_s`` of training.
    """
    marks = np.array(sorted(groups, key=lambda group: group[-1])).reshape(-1, len(GROUP_MARKS))
    shown = np.unique(np.linspace(0, len(marks) - 1, min(len(marks), GROUPS_SHOWN)).round().astype(int))
    recorder.event(
        "timeline",
        step=step,
        began=round(began, 3),
        groups=(marks[shown] - began).round(3).tolist(),
        all_groups=len(marks),
        offered=round(offered - began, 3),
        trained=[round(live - refresh_s - train_s - began, 3), round(live - refresh_s - began, 3)],
        live=round(live - began, 3),
    )
