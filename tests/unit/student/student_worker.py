"""One rank of the student's tests: runs everything under one parallel layout, rank 0 saves what came out.

Usage: torchrun ... student_worker.py WORK_FOLDER LAYOUT '{"tensor_parallel": 2, ...}'
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from student_case import MODELS, Sample, denominator_of, make_config, pack

from megatron_opd.config import LossConfig
from megatron_opd.errors import ConfigError
from megatron_opd.student import export, step
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.logprob import vocab_parallel_logprob


def main() -> None:
    work, layout, sizes = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    init_distributed(make_config(work, **sizes).student, seed=0, timeout_s=60)
    result: dict[str, Any] = {"logprob": logprob_differences()}
    result["demand"] = demanded_backend(work, sizes)
    result["half"] = half_precision(work, layout, sizes)
    for kind in MODELS:
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
    }
    export._SHARD_BYTES = 30_000 if kind == "llama" else 10_000_000
    export.export_hf(student, work / kind, work / f"{kind}-{layout}")
    if kind not in ("tied", "untied"):
        return result
    result["refused"] = refused(student, samples)
    for split, rows in splits(samples).items():
        result[split] = one_step(build_student(config), samples, rows)
    return result


def demanded_backend(work: Path, sizes: dict[str, Any]) -> str:
    """What is said to someone who demands Transformer Engine on a CPU."""
    try:
        build_student(make_config(work / "untied", backend="transformer_engine", **sizes))
    except ConfigError as error:
        return str(error)
    return ""


def half_precision(work: Path, layout: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """A step and an export in bfloat16."""
    samples = pickle.loads((work / "untied.samples").read_bytes())
    student = build_student(make_config(work / "untied", dtype="bfloat16", **sizes))
    assert student.bridge.config.sequence_parallel == sizes.get("sequence_parallel", False)
    found = one_step(student, samples, splits(samples)["row_each"])["metrics"]
    export.export_hf(student, work / "untied", work / f"half-{layout}")
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


def one_step(student: Student, samples: list[Sample], rows: list[list[int]]) -> dict[str, Any]:
    metrics = step.train_step(student, pack(samples, rows, denominator_of(samples)), LossConfig())
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
    (chunk,) = student.model
    for buffer in chunk.buffers:
        if chunk.ddp_config.use_distributed_optimizer:  # each data-parallel rank holds one reduced piece
            group = parallel_state.get_data_parallel_group()
            piece = buffer.grad_data.chunk(group.size())[group.rank()].clone()
            dist.all_gather_into_tensor(buffer.grad_data, piece, group=group)
    for parameter in chunk.parameters():
        parameter.data.copy_(parameter.main_grad)
    return exported(student)


def packed_logprobs(student: Student, samples: list[Sample]) -> list[np.ndarray]:
    """Log-probs of two rows, one sample after the other."""
    rows = step._batch_rows(student, pack(samples, [[0, 1, 2], [3, 4]], 1.0))
    with torch.no_grad():
        collected = step._run(student, rows, step._logprobs_of_row, forward_only=True)
    found = []
    for row, parts in zip(collected, [samples[:3], samples[3:]], strict=True):
        start = 0
        for sample in parts:
            found.append(row["logprobs"][start : start + len(sample.tokens) - 1].numpy())
            start += len(sample.tokens)
    return found


def refused(student: Student, samples: list[Sample]) -> dict[str, Any]:
    """Steps that are not finite must fail on every rank and change nothing; masked positions are never read."""
    before = exported(student)
    # Rank 0 alone holds the bad sample: a rank with healthy ones must fail as well.
    rows = [[0]] if parallel_state.get_data_parallel_rank() == 0 else [[1]]
    messages = {}
    for name, advantage in {"loss": np.nan, "gradient": 1e30}.items():
        spoilt = dataclasses.replace(samples[0], advantages=np.full_like(samples[0].advantages, advantage))
        try:
            step.train_step(student, pack([spoilt, samples[1]], rows, 1.0), LossConfig())
        except step.NonFiniteError as error:
            messages[name] = str(error)
    after = exported(student)
    return {"messages": messages, "unchanged": all(torch.equal(before[name], after[name]) for name in before)}


def logprob_differences() -> dict[str, float]:
    """vocab_parallel_logprob against log_softmax over the real columns: largest differences."""
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(5)
    found = {}
    for vocab, dtype in ((515, torch.float32), (400, torch.float32), (100, torch.float32), (515, torch.bfloat16)):
        logits = (torch.randn(9, 516, generator=generator) * 5).to(dtype)
        labels = torch.randint(0, vocab, (9,), generator=generator)
        weights = torch.randn(9, generator=generator)

        whole = logits.clone().requires_grad_()
        expected = torch.log_softmax(whole[:, :vocab].float(), -1).gather(1, labels[:, None])[:, 0]
        (expected * weights).sum().backward()

        mine = logits.chunk(group.size(), dim=1)[group.rank()].clone().requires_grad_()
        logprobs = vocab_parallel_logprob(mine, labels, vocab, group)
        (logprobs * weights).sum().backward()
        expected_gradient = whole.grad.chunk(group.size(), dim=1)[group.rank()]
        first = group.rank() * mine.shape[1]
        name = f"{vocab} {str(dtype).removeprefix('torch.')}"
        found[f"{name} value"] = float((logprobs - expected).detach().abs().max())
        found[f"{name} gradient"] = float((mine.grad - expected_gradient).abs().max())
        found[f"{name} padding"] = float(mine.grad[:, max(0, vocab - first) :].abs().sum())
        assert logprobs.dtype == torch.float32 and mine.grad.dtype == dtype
    return found


if __name__ == "__main__":
    main()
