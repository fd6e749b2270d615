"""Time of ``calibrate`` in every mode, against a plain loop over groups that gives the same result.

    python tools/bench_recipe.py [--repeat 20] [--mode TEXT]

Milliseconds of CPU time of one thread, best of ``--repeat`` calls. The loop handles one unit after the other with
numpy and removes trajectories one by one; it makes no report. Where a batch is one unit the greedy loop is skipped:
it takes minutes. Exits with 1 when a mode misses its target (64 groups of 16: 1 ms; 4096 of 64: 100 ms).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.calibrate import calibrate

TARGETS_MS = {(64, 16): 1.0, (4096, 64): 100.0}
LARGEST_GREEDY_LOOP = 1024


def batch(groups: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns with the spread of a real run, pass rates that differ by group, rollouts in random order."""
    rng = np.random.default_rng(0)
    names = rng.permutation(np.repeat(np.arange(groups), size))
    outcomes = (rng.random(len(names)) < rng.beta(2, 2, groups)[names]).astype(np.int8)
    return rng.normal(-0.3, 0.06, len(names)), outcomes, names


def modes() -> Iterator[CalibrationConfig]:
    """Every combination that does something else."""
    yield CalibrationConfig(method="none")
    for scope in ("group", "global"):
        for margin, direction in product(("mean", "minmax", "hinge"), ("lift", "drop", "spread", "balanced")):
            yield CalibrationConfig(method="shift", margin=margin, scope=scope, direction=direction, delta=0.05)
        yield CalibrationConfig(method="shift", margin="mean", scope=scope, delta=1.0, delta_unit="sigma")
        for margin in ("mean", "minmax"):
            yield CalibrationConfig(method="mask", margin=margin, scope=scope, delta=0.05)
    for margin in ("mean", "minmax"):
        yield CalibrationConfig(method="mask_group", margin=margin, delta=0.05)


def loop(
    returns: np.ndarray, outcomes: np.ndarray, groups: np.ndarray, options: CalibrationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and keep mask, unit by unit."""
    offsets, keep = np.zeros(len(returns)), np.ones(len(returns), dtype=bool)
    units: dict[int, list[int]] = {}
    for place, group in enumerate(groups.tolist()):
        units.setdefault(0 if options.scope == "global" else group, []).append(place)
    for places in units.values():
        own = np.array(places)
        good, bad = own[outcomes[own] == 1], own[outcomes[own] == 0]
        if not len(good) or not len(bad) or options.method == "none":
            continue
        delta = options.delta * (returns[own].std() if options.delta_unit == "sigma" else 1.0)
        if options.method == "shift":
            offsets[good], offsets[bad] = loop_shift(returns[good], returns[bad], delta, options)
        elif options.method == "mask_group":
            keep[own] = gap(returns[good], returns[bad], options.margin) >= delta
        else:
            loop_greedy(returns, good, bad, delta, options, keep)
    return offsets, keep


def gap(good: np.ndarray, bad: np.ndarray, margin: str) -> float:
    return good.mean() - bad.mean() if margin == "mean" else good.min() - bad.max()


def loop_shift(
    good: np.ndarray, bad: np.ndarray, delta: float, options: CalibrationConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of both sides of one unit."""
    shift = max(0.0, delta - gap(good, bad, options.margin))
    rate = len(bad) / (len(good) + len(bad))
    up = shift * {"lift": 1.0, "drop": 0.0, "spread": 0.5, "balanced": rate}[options.direction]
    if options.margin != "hinge":
        return np.full(len(good), up), np.full(len(bad), up - shift)
    if options.direction == "balanced":
        low, high = 0.0, shift
        for _ in range(50):
            up = (low + high) / 2
            rise = np.maximum(0.0, good.min() + up - good).sum()
            fall = np.maximum(0.0, bad - bad.max() + shift - up).sum()
            low, high = (up, high) if rise < fall else (low, up)
    return np.maximum(0.0, good.min() + up - good), -np.maximum(0.0, bad - bad.max() + shift - up)


def loop_greedy(
    returns: np.ndarray, good: np.ndarray, bad: np.ndarray, delta: float, options: CalibrationConfig, keep: np.ndarray
) -> None:
    """Removes the worst of either side of one unit, one by one; these random returns have no ties."""
    good, bad = good[np.argsort(returns[good])], bad[np.argsort(-returns[bad])]
    least = [max(1, int(len(side) * options.min_retain)) for side in (good, bad)]
    while (now := gap(returns[good], returns[bad], options.margin)) < delta:
        gains = [
            gap(returns[good[1:]], returns[bad], options.margin) - now if len(good) > least[0] else 0.0,
            gap(returns[good], returns[bad[1:]], options.margin) - now if len(bad) > least[1] else 0.0,
        ]
        if max(gains) <= 0:
            break
        if gains[0] > gains[1]:
            keep[good[0]], good = False, good[1:]
        else:
            keep[bad[0]], bad = False, bad[1:]


def best_ms(call: Callable[[], object], repeat: int) -> float:
    times = []
    for _ in range(repeat):
        start = time.thread_time()
        call()
        times.append(time.thread_time() - start)
    return min(times) * 1e3


def main() -> int:
    """Print one line for each size and mode."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=20)
    parser.add_argument("--mode", default="", help="only modes whose name contains this")
    arguments = parser.parse_args()
    missed = 0
    for (groups, size), target in TARGETS_MS.items():
        args = batch(groups, size)
        print(f"{groups} groups x {size}, target {target:g} ms\n{'mode':38}{'ms':>10}{'loop ms':>12}{'ratio':>8}")
        for options in modes():
            name = f"{options.method} {options.margin} {options.scope} {options.direction} {options.delta_unit}"
            if arguments.mode not in name:
                continue
            spent = best_ms(lambda options=options, args=args: calibrate(*args, options), arguments.repeat)
            missed += spent > target
            line = f"{name:38}{spent:10.3f}"
            if options.method == "mask" and options.scope == "global" and groups * size > LARGEST_GREEDY_LOOP:
                print(f"{line}{'skipped':>12}{'':8}{'' if spent <= target else '  MISSED'}")
                continue
            slow = best_ms(lambda options=options, args=args: loop(*args, options), 1 if groups > 64 else 3)
            result, expected = calibrate(*args, options), loop(*args, options)
            assert np.allclose(result.offsets, expected[0], rtol=0, atol=1e-9), name
            assert np.array_equal(result.keep, expected[1]), name
            print(f"{line}{slow:12.3f}{slow / spent:8.1f}{'' if spent <= target else '  MISSED'}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
