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


def controls(mean_shift: float) -> dict[str, list[str]]:
    """Runs that differ from "all" in what stands for calibration.

    mean_shift: what calibration raised the margin of a mixed group by in the run "all" of the same seed, nats per
    token; the constant reward is as large in every mixed group, whatever the teacher says (docs/calibration.md, P2).
    """
    everything = PARTS["offline"][0]
    reward = ["calibration=null", f"objective.constant_reward={mean_shift:.4f}", "objective.constant_direction=spread"]
    return {"constant reward": [*everything, *reward], "random labels": [*everything, "objective.placebo=true"]}


def variations() -> dict[str, list[str]]:
    """Runs that differ from "all" in one setting, beside the grid."""
    return {
        "delta 4": [*PARTS["offline"][0], "calibration.delta=4.0"],
        "lazy instead of offline": ["data.lazy.prior=[1,1]"],
    }
