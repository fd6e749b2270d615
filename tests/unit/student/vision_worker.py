"""The ranks of the multimodal student's tests: run everything under each layout, rank 0 saves what came out.

Usage: vision_worker.py WORK_FOLDER
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked import run_layouts
from megatron.core import parallel_state
from student_case import denominator_of, make_config
from student_worker import everywhere, exported, gradients, on_rows
from vision_case import LAYOUTS, Seen, pack_seen

from megatron_opd.config import Config, LossConfig
from megatron_opd.records import PackedBatch
from megatron_opd.student import export, step
from megatron_opd.student.build import Student, build_student, init_distributed

ROWS = [[0, 1, 2], [3, 4]]  # text and images, and images of two sequences, in one row


def main() -> None:
    work = Path(sys.argv[1])
    ranks = {name: make_config(work, **sizes).world_size for name, (sizes, _) in LAYOUTS.items()}
    run_layouts(ranks, lambda name: run_layout(work, name), work)


def run_layout(work: Path, layout: str) -> None:
    sizes, kinds = LAYOUTS[layout]
    init_distributed(make_config(work, **sizes).student, seed=0, timeout_s=200)
    result = {kind: run_kind(work, layout, kind, sizes) for kind in kinds}
    if dist.get_rank() == 0:
        (work / f"{layout}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_kind(work: Path, layout: str, kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    seen = pickle.loads((work / f"{kind}.samples").read_bytes())
    frozen, learning = (config_of(work / kind, sizes, train_vision=train) for train in (False, True))
    student = build_student(frozen)
    result: dict[str, Any] = {
        "alone": [step.sequence_logprobs(student, one.sample.tokens, one.images) for one in seen],
        "packed": packed_logprobs(student, seen),
        "swapped": packed_logprobs(student, swapped(seen)),
    }
    # Other stages have no tower, and read no pixels.
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=True)
    assert hasattr(student.model[0].module, "visual") == bool(student.images._kept) == first
    export.export_hf(student, work / kind, work / f"{kind}-{layout}")
    result["frozen"] = one_step(student, seen, "row_each")
    result |= {split: one_step(build_student(learning), seen, split) for split in ("row_each", "one_row")}
    student = build_student(learning)
    for split in ("row_each", "one_row"):  # from the second on, gradients are sent when all are there
        step.train_step(student, batch_of(seen, split), LossConfig())
    result["after_two_steps"] = exported(student)
    if layout == "tp2":
        student = build_student(learning)
        add_in_another_order(student)
        result["drift"] = one_step(student, seen, "row_each")
    half = build_student(config_of(work / kind, sizes | {"dtype": "bfloat16"}, train_vision=True))
    result["half"] = dataclasses.asdict(step.train_step(half, batch_of(seen, "row_each"), LossConfig()))
    return result


def config_of(folder: Path, sizes: dict[str, Any], *, train_vision: bool) -> Config:
    config = make_config(folder, train_vision=train_vision, **sizes)
    images = config.data.images.model_copy(update={"folder": folder.parent / "images"})
    return config.model_copy(update={"data": config.data.model_copy(update={"images": images})})


def packed_logprobs(student: Student, seen: list[Seen]) -> list[np.ndarray]:
    """Log-probs of the samples of ROWS."""
    collected = on_rows(student, pack_seen(seen, ROWS, 1.0), step._logprobs_of_row)
    found = []
    for row, members in zip(collected, ROWS, strict=True):
        lengths = [len(seen[index].sample.tokens) for index in members]
        parts = np.split(row["logprobs"].numpy(), np.cumsum(lengths)[:-1])
        found += [part[:-1] for part in parts]
    return found


def swapped(seen: list[Seen]) -> list[Seen]:
    """The third sample's last image in the place of the second sample's, which is of the same size."""
    other = seen[2].images[-1]
    image = dataclasses.replace(seen[1].images[0], hash=other.hash)
    return [seen[0], dataclasses.replace(seen[1], images=(image,)), *seen[2:]]


def batch_of(seen: list[Seen], split: str) -> PackedBatch:
    """This data-parallel rank's part. In "one_row", all but the first have neither images nor tokens."""
    rank, copies = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    everything = list(range(len(seen)))
    parts = {
        "row_each": [[index] for index in everything[rank::copies]],
        "one_row": [everything] if rank == 0 else [],
    }[split]
    return pack_seen(seen, parts, denominator_of([one.sample for one in seen]))


def one_step(student: Student, seen: list[Seen], split: str) -> dict[str, Any]:
    """One optimizer step, and what came of it on every rank."""
    metrics = step.train_step(student, batch_of(seen, split), LossConfig())
    after = step.sequence_logprobs(student, seen[2].sample.tokens, seen[2].images)  # before anything is gathered
    weights = exported(student)
    for other_metrics, other_weights in everywhere((metrics, weights)):
        assert other_metrics == metrics
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights)
    return {
        "metrics": dataclasses.asdict(metrics),
        "after": after,
        "weights": weights,
        "gradients": gradients(student),
    }


def add_in_another_order(student: Student) -> None:
    """As a GPU does, only more of it: each tensor-parallel rank finds another gradient, around the right one."""
    sign = 1 - 2 * parallel_state.get_tensor_model_parallel_rank()
    student.model[0].module.visual.patch_embed.proj.weight.register_hook(lambda gradient: gradient * (1 + 0.1 * sign))


if __name__ == "__main__":
    main()
