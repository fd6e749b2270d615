"""The switches of outcome-guided margin calibration, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal, get_args, get_type_hints

from megatron_opd.errors import ConfigError

Method = Literal["none", "shift", "mask", "mask_group"]
Margin = Literal["mean", "minmax", "hinge"]
Scope = Literal["group", "global"]
Direction = Literal["lift", "drop", "spread", "balanced"]
DeltaUnit = Literal["absolute", "sigma"]


@dataclass(frozen=True, slots=True)
class CalibrationOptions:
    """How ``calibrate`` works. A unit is one prompt's group (scope "group") or the whole batch (scope "global").

    method      "shift": move returns until the unit's margin is delta; "mask": remove the worst trajectories until it
                is, one by one; "mask_group": remove units whose margin is below delta; "none": report only
    margin      "mean": mean of the correct minus mean of the incorrect returns; "minmax": lowest correct minus highest
                incorrect; "hinge" (shift only): as minmax, but only the trajectories out of order move
    scope       "group" or "global"; "mask_group" needs "group": a batch that is one unit would be removed as a whole
    direction   who moves, of the shift s: "lift" the correct by s; "drop" the incorrect by -s; "spread" both by half;
                "balanced" by their shares, so that a unit's offsets add to 0 (the smallest correction)
    delta       margin to reach, nats per token or standard deviations; may be negative (tolerates some disorder)
    delta_unit  "absolute", or "sigma": delta is multiplied by the population standard deviation of the unit's graded
                returns, both outcomes pooled, before the shift. All returns equal: sigma 0, hence a delta of 0
    max_shift   no offset is larger than this, nats per token; None: no cap. With a cap the margin may stay below delta
    min_retain  "mask" keeps at least max(1, floor(min_retain * n)) of the n trajectories of either outcome

    Raises ConfigError (a ValueError) for an unknown name, a number out of range or a combination without meaning.
    Source: Uni-OPD, arXiv 2605.03677, equations 9 to 11 of version 1 and appendix C of version 2; the paper's Spread is
    "spread", the authors' "correct_up", "incorrect_down" and "both" are "lift", "drop" and "spread". "hinge",
    "balanced", "sigma" and the cap are additions: docs/calibration.md.
    """

    method: Method = "shift"
    margin: Margin = "mean"
    scope: Scope = "group"
    direction: Direction = "spread"
    delta: float = 0.0
    delta_unit: DeltaUnit = "absolute"
    max_shift: float | None = None
    min_retain: float = 0.25

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            names = get_args(hints[field.name])
            value = getattr(self, field.name)
            if isinstance(names[0] if names else None, str) and value not in names:
                raise ConfigError(f"unknown {field.name}", got=repr(value), expected=f"one of {', '.join(names)}")
        _check_number("delta", self.delta, -math.inf, math.inf)
        _check_number("min_retain", self.min_retain, 0.0, 1.0)
        if self.max_shift is not None:
            _check_number("max_shift", self.max_shift, 0.0, math.inf)
        pair = f"method {self.method!r} with margin {self.margin!r} and scope {self.scope!r}"
        if self.margin == "hinge" and self.method in ("mask", "mask_group"):
            raise ConfigError("hinge is a way to shift", got=pair, expected="margin mean or minmax, or method shift")
        if self.scope == "global" and self.method == "mask_group":
            raise ConfigError("the whole batch would be removed as one unit", got=pair, expected="scope group")


def _check_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not low <= value <= high:
        raise ConfigError(f"{name} is no such number", got=repr(value), expected=f"finite, from {low} to {high}")
