"""The table of docs/student.md: how far each parallel layout is from one process, and how long a step takes.

    python tools/layout_table.py

The model and the batch are those of tests/unit/student; so is the reference, one process that goes through the batch
token by token. Errors are relative: that of the loss, and of each gradient the largest error over the largest entry, of
which the worst tensor is shown. The time is the fastest of several steps of a tiny model: what a layout costs in
messages, not what it gains.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit/student"))

from forked import run_layouts
from student_case import LAYOUTS, denominator_of, kinds_of, make_config, make_model, make_samples, pack, slow_reference
from student_worker import one_step, splits
from transformers import AutoModelForCausalLM

from megatron_opd.config import LossConfig
from megatron_opd.student.build import build_student, init_distributed
from megatron_opd.student.step import train_step

STEPS = 10


def main() -> None:
    torch.set_num_threads(1)
    busy = []
    print("| layout | model | ranks | error of the loss | error of the gradient | step, ms |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        references = {kind: make_case(work, kind) for kind in ("untied", "experts")}
        for name, sizes in LAYOUTS.items():
            kind = kinds_of(name)[0]
            ranks = make_config(work / kind, **sizes).world_size
            run_layouts({name: ranks}, lambda name, kind=kind: measure(work, name, kind, references[kind]), work)
            found = json.loads((work / f"{name}.json").read_text())
            cells = [described(sizes), "experts" if kind == "experts" else "dense", ranks]
            errors = [f"{found[what]:.0e}" for what in ("loss", "gradient")]
            busy.append(os.getloadavg()[0])
            print("|", " | ".join(map(str, [*cells, *errors, f"{1000 * found['seconds']:.0f}"])), "|", flush=True)
    print(f"\nLoad average: {min(busy):.0f} to {max(busy):.0f}; above the number of cores, the times are too long.")


def make_case(work: Path, kind: str) -> dict[str, Any]:
    """Save a model and its samples; what the reference makes of them."""
    make_model(work / kind, kind)
    samples = make_samples(AutoModelForCausalLM.from_pretrained(work / kind, dtype="auto"))
    (work / f"{kind}.samples").write_bytes(pickle.dumps(samples))
    return slow_reference(work / kind, samples)


def measure(work: Path, name: str, kind: str, expected: dict[str, Any]) -> None:
    """One rank: a step against the reference, then several by the clock."""
    config = make_config(work / kind, **LAYOUTS[name])
    init_distributed(config.student, seed=0)
    samples = pickle.loads((work / f"{kind}.samples").read_bytes())
    rows = splits(samples)["row_each"]
    found = one_step(build_student(config), samples, rows)
    gradients = expected["gradients"]
    errors = [(found["gradients"][key] - gradients[key]).abs().max() / gradients[key].abs().max() for key in gradients]
    student, seconds = build_student(config), []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        train_step(student, pack(samples, rows, denominator_of(samples)), LossConfig())
        seconds.append(time.perf_counter() - began)
    if dist.get_rank() == 0:
        loss = abs(found["metrics"]["loss"] / expected["loss"] - 1)
        result = {"loss": loss, "gradient": float(max(errors)), "seconds": min(seconds)}
        (work / f"{name}.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def described(sizes: dict[str, Any]) -> str:
    """Sizes and switches as a reader of the config knows them."""
    return ", ".join(key if value is True else f"{key} {value}" for key, value in sizes.items()) or "one process"


if __name__ == "__main__":
    main()
