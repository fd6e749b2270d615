"""The runs of the ablation: which parts of the recipe each switches on, as overrides of conf/ablation.yaml."""

from __future__ import annotations

from itertools import product
from pathlib import Path

WEIGHTED = Path("runs/toy-difficulty/weighted.jsonl")
PARTS = {  # part -> overrides that switch it on, overrides that switch it off
    "offline": ([f"data.train={WEIGHTED}", "data.columns.repeats=repeats"], []),
    "online": ([], ["balance=null"]),
    "calibration": ([], ["calibration=null"]),
}


def grid() -> dict[str, list[str]]:
    """Name of each of the 8 cells -> its overrides."""
    cells = {}
    for switches in product((False, True), repeat=len(PARTS)):
        on = [part for part, switch in zip(PARTS, switches, strict=True) if switch]
        name = "none" if not on else "all" if len(on) == len(PARTS) else "+".join(on)
        cells[name] = [text for part, (yes, no) in PARTS.items() for text in (yes if part in on else no)]
    return cells


def constant_reward(mean_shift: float) -> list[str]:
    """ "all" with an outcome reward in place of calibration: the same in every mixed group, whatever the teacher says.

    mean_shift: what calibration raised the margin of a mixed group by in the run that this one is compared with, nats
    per token (docs/calibration.md, P2).
    """
    reward = [f"objective.constant_reward={mean_shift:.4f}", "objective.constant_direction=spread"]
    return [*PARTS["offline"][0], "calibration=null", *reward]


RANDOM_LABELS = [*PARTS["offline"][0], "objective.placebo=true"]
DELTA_4 = [*PARTS["offline"][0], "calibration.delta=4.0"]
LAZY = ["data.lazy.prior=[1,1]"]
BESIDE_THE_GRID = (
    "constant reward",
    "random labels",
    "delta 4",
    "constant reward as delta 4",
    "lazy instead of offline",
)
