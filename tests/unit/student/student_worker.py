"""The ranks of the student's tests: run everything under each parallel layout, rank 0 saves what came out.

Usage: student_worker.py WORK_FOLDER '{"tp2": {"tensor_parallel": 2}, ...}'
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from forked import run_layouts
from megatron.core import parallel_state
from student_case import SCORED_ONLY, Sample, denominator_of, kinds_of, make_config, pack

from megatron_opd.config import LossConfig
from megatron_opd.errors import ConfigError
from megatron_opd.records import PackedBatch
from megatron_opd.student import export, rows, step
from megatron_opd.student.build import Student, build_student, init_distributed


def main() -> None:
    work, layouts = Path(sys.argv[1]), json.loads(sys.argv[2])
    ranks = {name: make_config(work, **sizes).world_size for name, sizes in layouts.items()}
    run_layouts(ranks, lambda name: run_layout(work, name, layouts[name]), work)


def run_layout(work: Path, layout: str, sizes: dict[str, Any]) -> None:
    init_distributed(make_config(work, **sizes).student, seed=0, timeout_s=200)
    kinds = kinds_of(layout)
    result: dict[str, Any] = {"demand": demanded(work, kinds[0], sizes)}
    result["half"] = half_precision(work, layout, kinds[0], sizes)
    for kind in kinds:
        result[kind] = run_model(work, layout, kind, sizes)
    if dist.get_rank() == 0:
        (work / f"{layout}.pickle").write_bytes(pickle.dumps(result))
    dist.barrier()
    dist.destroy_process_group()


def run_model(work: Path, layout: str, kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    config = make_config(work / kind, **sizes)
    samples = pickle.loads((work / f"{kind}.samples").read_bytes())
    student = build_student(config)
    result: dict[str, Any] = {
        "backend": (student.backend, student.reason),
        "alone": [step.sequence_logprobs(student, sample.tokens) for sample in samples],
        "packed": packed_logprobs(student, samples),
        "misplaced": misplaced(student, samples),
    }
    export.export_hf(student, work / kind, work / f"{kind}-{layout}", 30_000 if kind == "llama" else export.SHARD_BYTES)
    if kind in SCORED_ONLY:
        return result
    result["refused"] = refused(student, samples)
    for split, parts in splits(samples).items():
        result[split] = one_step(build_student(config), samples, parts)
    return result


def demanded(work: Path, kind: str, sizes: dict[str, Any]) -> dict[str, str]:
    """What is said to someone who demands of a CPU what only Transformer Engine has."""
    said = {}
    for name, options in {"backend": {"backend": "transformer_engine"}, "fp8": {"fp8": "e4m3"}}.items():
        config = make_config(work / kind, **{"device": "auto", **options, **sizes})
        try:
            build_student(config)
        except ConfigError as error:
            said[name] = str(error)
    return said


def half_precision(work: Path, layout: str, kind: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """A step and an export in bfloat16."""
    samples = pickle.loads((work / f"{kind}.samples").read_bytes())
    student = build_student(make_config(work / kind, dtype="bfloat16", **sizes))
    assert student.bridge.config.sequence_parallel == sizes.get("sequence_parallel", False)
    found = one_step(student, samples, splits(samples)["row_each"])["metrics"]
    export.export_hf(student, work / kind, work / f"half-{layout}")
    return found


def splits(samples: list[Sample]) -> dict[str, list[list[int]]]:
    """This data-parallel rank's rows, in ways that must not matter."""
    everything = list(range(len(samples)))
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return {
        "one_row": [everything] if rank == 0 else [],
        "row_each": [[index] for index in everything[rank::size]],
        "mixed": [everything[rank::size][:1], everything[rank::size][1:]],
    }


def one_step(student: Student, samples: list[Sample], parts: list[list[int]]) -> dict[str, Any]:
    metrics = step.train_step(student, pack(samples, parts, denominator_of(samples)), LossConfig())
    weights = exported(student)
    for other_metrics, other_weights in everywhere((metrics, weights)):
        assert other_metrics == metrics
        assert all(torch.equal(other_weights[name], weights[name]) for name in weights)
    return {"metrics": dataclasses.asdict(metrics), "weights": weights, "gradients": gradients(student)}


def everywhere(item: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, item)
    return found


def exported(student: Student) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in export.hf_weights(student)}


def gradients(student: Student) -> dict[str, torch.Tensor]:
    """The reduced gradients under Hugging Face names: put in place of the weights, then exported."""
    for chunk in student.model:
        kinds = (
            (chunk.buffers, parallel_state.get_data_parallel_group(with_context_parallel=True)),
            (chunk.expert_parallel_buffers, parallel_state.get_expert_data_parallel_group()),
        )
        buckets = [(bucket, group) for buffers, group in kinds for buffer in buffers for bucket in buffer.buckets]
        for bucket, group in buckets:
            if chunk.ddp_config.use_distributed_optimizer:  # each copy holds one reduced piece
                piece = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, piece, group=group)
        for parameter in chunk.parameters():
            if parameter.requires_grad:
                parameter.data.copy_(parameter.main_grad)
    return exported(student)


def packed_logprobs(student: Student, samples: list[Sample]) -> list[np.ndarray]:
    """Log-probs of two rows, one sample after the other."""
    collected = on_rows(student, pack(samples, [[0, 1, 2], [3, 4]], 1.0), step._logprobs_of_row)
    found = []
    for row, parts in zip(collected, [samples[:3], samples[3:]], strict=True):
        start = 0
        for sample in parts:
            found.append(row["logprobs"][start : start + len(sample.tokens) - 1].numpy())
            start += len(sample.tokens)
    return found


def on_rows(student: Student, batch: PackedBatch, score: Callable) -> list[dict[str, torch.Tensor]]:
    """What ``score`` collects of each row of the batch, put together over the ranks that hold parts of it."""
    made = rows.batch_rows(student, batch)
    with torch.no_grad():
        collected = step._run(student, made, score, forward_only=True)
    whole = []
    for number, row in enumerate(made[: len(batch.row_offsets) - 1]):
        names = everywhere(list(collected[number]) if collected else [])[-1]  # the last rank is of the last stage
        values = {name: collected[number][name] if collected else None for name in names}
        whole.append({name: rows.whole_row(row, value) for name, value in values.items()})
    return whole


def misplaced(student: Student, samples: list[Sample]) -> list[str]:
    """Arrays that reach the loss on the last stage at another position than they had: each value tells where it was."""
    batch = pack(samples, [[0, 1, 2], [3, 4]], 1.0)
    code = np.arange(1, len(batch.tokens) + 1)
    columns = code[:, None] + 100 * np.arange(3)
    names = ("tokens", "labels", "advantages", "behaviour_logprobs", "weights", "lags", "slopes", "forward_weights")
    batch = dataclasses.replace(batch, **dict.fromkeys(names, code), top_ids=columns, top_logprobs=columns)

    def carry(row: rows.Row, vocab_size: int, output: torch.Tensor) -> step.LossOutput:
        kept = {name: getattr(row, name) for name in names}
        for column in range(3):
            kept |= {f"{name} {column}": getattr(row, name)[:, column] for name in ("top_ids", "top_logprobs")}
        return output.sum(), step._no_count(output), kept

    found = on_rows(student, batch, carry)
    joined = {name: torch.cat([row[name] for row in found]) for name in found[0]}
    expected = {name: code + 100 * int(name.split()[1]) if " " in name else code for name in joined}
    return [name for name, values in joined.items() if values.tolist() != expected[name].tolist()]


def refused(student: Student, samples: list[Sample]) -> dict[str, Any]:
    """Steps that are not finite must fail on every rank and change nothing; masked positions are never read."""
    before = exported(student)
    # Rank 0 alone holds the bad sample: a rank with healthy ones must fail as well.
    parts = [[0]] if parallel_state.get_data_parallel_rank() == 0 else [[1]]
    messages = {}
    for name, advantage in {"loss": np.nan, "gradient": 1e30}.items():
        spoilt = dataclasses.replace(samples[0], advantages=np.full_like(samples[0].advantages, advantage))
        try:
            step.train_step(student, pack([spoilt, samples[1]], parts, 1.0), LossConfig())
        except step.NonFiniteError as error:
            messages[name] = str(error)
    after = exported(student)
    return {"messages": messages, "unchanged": all(torch.equal(before[name], after[name]) for name in before)}


if __name__ == "__main__":
    main()
