"""Step time of the coordinator's loop against its slowest stage, at several bounds of staleness, in virtual time.

    python tools/bench_overlap.py [--steps N]

The loop, buffer, stages and recipe are the real ones; engine, teacher and student are fakes that take a known time on
a clock that jumps, so the figures are exact and the machine's speed is not in them. A "stream" engine serves 8 of 64
groups at once, so that groups finish one after the other; a "wave" engine serves all 64 at once, and every group takes
as long as the whole step. The teacher likewise.

No schedule can do better than the lower bound: a step takes at least as long as its slowest stage; and since no token
may be older than s steps, step k + s is begun when weights k are live, so that s + 1 steps take at least as long as one
step alone, which is what a step takes at staleness 0. Exits with 1 when a step takes more than 1.01 x that bound, or
when a wave at staleness 0 does not take the sum of its stages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from fake_world import FakeWorld, Times
from virtual_time import run_in_virtual_time

GROUPS, SAMPLES = 64, 16
STAGES = [(3.0, 1.0, 2.0), (1.0, 3.0, 2.0), (1.0, 2.0, 4.0), (4.0, 1.0, 3.9), (4.0, 4.0, 4.0)]
KINDS = {"stream": 8, "wave": GROUPS}  # slots


def step_time(times: Times, staleness: int, steps: int) -> float:
    """Seconds of a step after the first two, of a run of ``steps``."""
    size = (f"rollout.prompts_per_step={GROUPS}", f"rollout.samples_per_prompt={SAMPLES}")

    async def run(folder: Path) -> list[float]:
        quiet = ("record.trajectories_every=0", "checkpoint.every_steps=0")
        world = FakeWorld(folder, times, *size, *quiet, f"steps={steps}", f"rollout.max_staleness={staleness}")
        await world.drive()
        assert max(world.student.most_lag) <= staleness
        return world.student.finished

    with tempfile.TemporaryDirectory() as folder:
        finished = run_in_virtual_time(run(Path(folder)))
    return (finished[-1] - finished[1]) / (len(finished) - 2)


def main() -> int:
    """Print the table; 1 when a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    print("engine  generate score train  staleness  step s  / slowest  / sum  lower bound")
    missed = False
    for (kind, slots), stages in product(KINDS.items(), STAGES):
        alone = step_time(Times(*stages, slots), 0, steps)
        missed |= kind == "wave" and abs(alone / sum(stages) - 1) > 0.01
        for staleness in (0, 1, 2):
            found, slowest, total = step_time(Times(*stages, slots), staleness, steps), max(stages), sum(stages)
            bound = max(slowest, alone / (staleness + 1))
            missed |= found > 1.01 * bound
            columns = " ".join(f"{seconds:6.1f}" for seconds in stages)
            ratios = f"{found / slowest:9.3f} {found / total:7.3f} {bound:12.3f}"
            print(f"{kind:7} {columns} {staleness:9} {found:9.3f} {ratios}")
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
