"""Real gloo ranks, groups cut across them, one rank without a sample: equal to the bit to one process.

Run by path, this file is the launcher of the ranks: ``python test_calibrate_sharded.py FOLDER``. It forks them, so that
torch is imported once.
"""

from __future__ import annotations

import multiprocessing
import pickle
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from itertools import product
from pathlib import Path

import numpy as np

from megatron_opd.config import CalibrationConfig
from megatron_opd.recipe.calibrate import calibrate, calibrate_sharded

RANKS = 4
# First row of each rank; row 37 is inside a group, and in the world of four rank 1 has nothing.
CUTS = {1: [0, 96], 2: [0, 37, 96], 4: [0, 37, 37, 61, 96]}
OPTIONS = [
    *(
        CalibrationConfig(
            method="shift", margin=margin, scope=scope, direction=direction, delta=0.3, delta_unit=unit, max_shift=0.8
        )
        for margin, scope, direction, unit in product(
            ("mean", "minmax", "hinge"), ("group", "global"), ("spread", "balanced"), ("absolute", "sigma")
        )
    ),
    *(
        CalibrationConfig(method="mask", margin=margin, scope=scope, delta=0.3)
        for margin in ("mean", "minmax")
        for scope in ("group", "global")
    ),
    CalibrationConfig(method="mask_group", delta=0.3),
]


def inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """96 rollouts of 8 prompts in mixed order, with failures, unknown outcomes and equal returns."""
    rng = np.random.default_rng(7)
    returns = rng.normal(-0.3, 0.5, 96)
    returns[::9] = np.round(returns[::9])
    returns[[5, 50]] = np.nan
    return returns, rng.choice([1, 0, -1], 96, p=[0.45, 0.45, 0.1]).astype(np.int8), rng.permutation(np.arange(96) % 8)


def work(rank: int, folder: Path) -> None:
    """One rank: in worlds of 1, 2 and 4, every mode over its own rows; writes its slices."""
    import torch  # the parent needs none
    import torch.distributed as dist

    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=timedelta(seconds=60))
    results = {}
    for world, cuts in CUTS.items():
        ranks = dist.new_group(list(range(world)))
        if rank >= world:
            continue

        def gather(local: np.ndarray, world=world, ranks=ranks) -> tuple[np.ndarray, int]:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
            dist.all_gather(sizes, torch.tensor([len(local)]), group=ranks)
            padded = torch.zeros(max(int(size) for size in sizes), 3, dtype=torch.float64)
            padded[: len(local)] = torch.from_numpy(local)
            parts = [torch.empty_like(padded) for _ in range(world)]
            dist.all_gather(parts, padded, group=ranks)
            rows = torch.cat([part[: int(size)] for part, size in zip(parts, sizes, strict=True)]).numpy()
            return rows, sum(int(size) for size in sizes[: dist.get_rank(ranks)])

        own = [array[cuts[rank] : cuts[rank + 1]] for array in inputs()]
        parts = [calibrate_sharded(*own, options, gather) for options in OPTIONS]
        results[world] = [(part.offsets, part.keep, asdict(part.report)) for part in parts]
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


def main(folder: Path) -> None:
    """Fork all ranks, wait for them, fail if one did."""
    import torch.distributed  # noqa: F401  before the fork

    ranks = [multiprocessing.get_context("fork").Process(target=work, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


def test_any_split_over_ranks_gives_the_same_bits(tmp_path: Path) -> None:
    subprocess.run([sys.executable, __file__, str(tmp_path)], check=True, timeout=120)
    results = [pickle.loads((tmp_path / f"{rank}.pickle").read_bytes()) for rank in range(RANKS)]
    for number, options in enumerate(OPTIONS):
        whole = calibrate(*inputs(), options)
        assert whole.offsets.any() or not whole.keep.all()
        for world in CUTS:
            parts = [results[rank][world][number] for rank in range(world)]
            assert np.concatenate([offsets for offsets, _, _ in parts]).tobytes() == whole.offsets.tobytes()
            assert np.concatenate([keep for _, keep, _ in parts]).tobytes() == whole.keep.tobytes()
            assert all(report == asdict(whole.report) for _, _, report in parts)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
