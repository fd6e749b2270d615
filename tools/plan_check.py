"""The table of docs/plan.md: what `megatron-opd plan` says of memory against real students, on a CPU.

    python tools/plan_check.py
    python tools/plan_check.py --only tp2,pp2 --json

Under each layout real Megatron ranks build a tiny random student and train a step. Weights, gradient buffers and
optimizer state are the bytes of the live tensors. Activations are the most bytes at once that autograd holds for the
backward pass, each storage counted once, weights not counted. Both passes is the most that torch allocates at once in
another forward and backward pass: activations, and what the backward pass needs for a moment; copies that gloo makes
of what it sends are left out, NCCL makes none. The fullest pipeline stage counts, in the measurement and in the plan.
How unevenly a random router chooses experts is measured too, and is what the plan assumes as `expert_imbalance`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import TEGroupedMLP
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/unit/student"))

from forked import run_layouts
from student_case import make_config

from megatron_opd.config import Config, LossConfig
from megatron_opd.plan.activations import MicroBatch, expert_tokens
from megatron_opd.plan.memory import stage_memory
from megatron_opd.plan.shape import read_shape
from megatron_opd.records import PackedBatch
from megatron_opd.student import step
from megatron_opd.student.build import Student, build_student, init_distributed
from megatron_opd.student.rows import batch_rows

PARTS = ("weights", "gradients", "optimizer", "activations", "both passes")
ROWS, SEQUENCES = 6, (160, 96)  # micro-batches of each data-parallel rank, and what is in each
_SIZES = {
    "vocab_size": 2000,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "max_position_embeddings": 512,
    "rope_theta": 5000.0,
}
_EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "router_aux_loss_coef": 0.0,
    "norm_topk_prob": True,
}
MODELS = {
    "dense": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=False),
    "tied": lambda: Qwen3Config(**_SIZES, tie_word_embeddings=True),
    "experts": lambda: Qwen3MoeConfig(**_SIZES, **_EXPERTS, tie_word_embeddings=False),
}
TP2 = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("dense", {}),
    "one_bf16": ("dense", {"dtype": "bfloat16"}),
    "one_selective": ("dense", {"recompute": "selective"}),
    "one_full": ("dense", {"recompute": "full"}),
    "tied_dp2_bf16": ("tied", {"data_parallel": 2, "dtype": "bfloat16"}),
    "tp2": ("tied", {"tensor_parallel": 2}),
    "tp2_sequence": ("dense", TP2),
    "tp2_sequence_full_bf16": ("dense", {**TP2, "recompute": "full", "dtype": "bfloat16"}),
    "pp2": ("dense", {"pipeline_parallel": 2}),
    "pp2_tied_bf16": ("tied", {"pipeline_parallel": 2, "dtype": "bfloat16"}),
    "pp2_virtual2": ("dense", {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "pp4_full": ("dense", {"pipeline_parallel": 4, "recompute": "full"}),
    "pp4_virtual2": ("dense", {"pipeline_parallel": 4, "virtual_pipeline": 2}),
    "cp2": ("dense", {"context_parallel": 2}),
    "tp2_cp2_selective": ("dense", {**TP2, "context_parallel": 2, "recompute": "selective"}),
    "experts_one": ("experts", {}),
    "experts_ep2": ("experts", {"data_parallel": 2, "expert_parallel": 2, "dtype": "bfloat16"}),
    "experts_ep2_tp2": ("experts", {**TP2, "data_parallel": 2, "expert_parallel": 2}),
    "experts_ep2_pp2_full": (
        "experts",
        {"data_parallel": 2, "expert_parallel": 2, "pipeline_parallel": 2, "recompute": "full"},
    ),
}


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)
    chosen = {name: LAYOUTS[name] for name in options.only}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for kind in {kind for kind, _ in chosen.values()}:
            save_model(work / kind, kind)
        configs = {name: make_config(work / kind, **sizes) for name, (kind, sizes) in chosen.items()}
        ranks = {name: config.world_size for name, config in configs.items()}
        run_layouts(ranks, lambda name: measure(work / name, configs[name]), work)
        found = {name: compared(config, work / name) for name, config in configs.items()}
    if options.json:
        print(json.dumps(found))
    else:
        show(found)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(LAYOUTS), help="layouts, by name")
    parser.add_argument("--json", action="store_true", help="numbers instead of the table")
    return parser.parse_args()


def save_model(folder: Path, kind: str) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[kind](), dtype=torch.float32).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")


def measure(result: Path, config: Config) -> None:
    """One rank: build, train a step, and let rank 0 write what each rank held."""
    init_distributed(config.student, seed=0)
    student = build_student(config)
    arrivals = watch_experts(student)
    kept = Kept({weight.untyped_storage().data_ptr() for chunk in student.model for weight in chunk.parameters()})
    with torch.autograd.graph.saved_tensors_hooks(kept.keep, Held.tensor_of):
        step.train_step(student, make_batch(), LossConfig())
    mine = {**resident_bytes(student), "activations": kept.peak, "imbalance": busiest(arrivals, config)}
    mine["both passes"] = allocated_bytes(student)
    held: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(held, mine)
    if dist.get_rank() == 0:
        result.write_text(json.dumps({part: fullest_stage(held, config, part) for part in (*PARTS, "imbalance")}))
    dist.barrier()
    dist.destroy_process_group()


def fullest_stage(held: list[dict[str, int]], config: Config, part: str) -> float:
    """Mean of a stage's ranks, of the stage where it is most."""
    ranks = config.world_size // config.student.pipeline_parallel  # they follow one another
    return max(float(np.mean([rank[part] for rank in held[i : i + ranks]])) for i in range(0, len(held), ranks))


def watch_experts(student: Student) -> list[int]:
    """A list that gets the tokens that reach this rank's experts, layer by layer, in the order of the passes."""
    arrivals: list[int] = []
    for chunk in student.model:
        for module in chunk.modules():
            if isinstance(module, TEGroupedMLP):
                module.register_forward_pre_hook(lambda _, given: arrivals.append(len(given[0])))
    return arrivals


def busiest(arrivals: list[int], config: Config) -> float:
    """Most tokens that reached the rank's experts, of the mean: a random router chooses unevenly.

    With full recomputation of one layer, since one at a time keeps them; else of all layers of a micro-batch.
    """
    if not arrivals:
        return 1.0
    shape = read_shape(config.student.model, "student.model")
    layers = 1 if config.student.recompute == "full" else shape.layers // config.student.pipeline_parallel
    passes = np.array(arrivals).reshape(-1, layers).mean(1)
    return float(passes.max() / expert_tokens(shape, config.student, row_of_check()))


def row_of_check() -> MicroBatch:
    """Every row of ``make_batch``."""
    return MicroBatch(sum(SEQUENCES), sum(length**2 for length in SEQUENCES))


def resident_bytes(student: Student) -> dict[str, int]:
    """Bytes of the live weights, gradient buffers and optimizer state of this rank."""
    weights = [weight for chunk in student.model for weight in chunk.parameters()]
    buffers = [buffer for chunk in student.model for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    state = 0
    for optimizer in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        moments = [value for values in optimizer.optimizer.state.values() for value in values.values()]
        copies = [copy for group in optimizer.shard_fp32_from_float16_groups for copy in group]
        state += sum(value.nbytes for value in [*moments, *copies] if torch.is_tensor(value) and value.numel() > 1)
    return {
        "weights": sum(weight.nbytes for weight in weights),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": state,
    }


def allocated_bytes(student: Student) -> int:
    """Most bytes at once that a forward and backward pass allocates, without gloo's copies of what it sends."""
    student.bridge.config.finalize_model_grads_func = lambda *_, **__: None  # gloo copies whole buffers to sum them
    batch = make_batch()
    score = partial(step._loss_of_row, denominator=batch.denominator, loss=LossConfig())
    rows = batch_rows(student, batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step._run(student, rows, score, forward_only=False)
    events = sorted(allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    now, peak, counted = 0, 0, {}  # bytes by address
    for _, place, size, sends in events:
        now -= counted.pop(place, 0)  # freed here, or by a thread of gloo that the profile does not see
        if size > 0 and not sends:
            counted[place] = size
            now += size
            peak = max(peak, now)
    return peak


def allocations(events: list[Any], sends: bool = False) -> Iterator[tuple[int, int, int, bool]]:
    """Time, address, bytes (below 0: freed) and whether a collective makes it, of all allocations in a profile."""
    for event in events:
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size, sends
        yield from allocations(event.children, sends or event.name.startswith("c10d::"))


@dataclass
class Kept:
    """Bytes that autograd holds now, and most that it held."""

    weights: set[int]  # storages that are not counted
    uses: Counter[int] = field(default_factory=Counter)  # by storage
    now: int = 0
    peak: int = 0

    def keep(self, tensor: torch.Tensor) -> Held:
        """A tensor is saved for the backward pass."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.weights:
            self.uses[place] += 1
            self.now += storage.nbytes() if self.uses[place] == 1 else 0
            self.peak = max(self.peak, self.now)
        return Held(self, tensor)

    def release(self, tensor: torch.Tensor) -> None:
        """It is no longer needed."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self.weights:
            self.uses[place] -= 1
            self.now -= storage.nbytes() if self.uses[place] == 0 else 0


@dataclass
class Held:
    """A saved tensor; autograd drops this object when it drops the tensor."""

    kept: Kept
    tensor: torch.Tensor

    def tensor_of(self) -> torch.Tensor:
        """The tensor itself."""
        return self.tensor

    def __del__(self) -> None:
        self.kept.release(self.tensor)


def make_batch() -> PackedBatch:
    """Rows of random tokens that are all trained on; every data-parallel rank has the same."""
    length = sum(SEQUENCES)
    tokens = np.random.default_rng(0).integers(0, _SIZES["vocab_size"], ROWS * length)
    ones, none = np.ones(len(tokens), np.float32), np.zeros((len(tokens), 0))
    return PackedBatch(
        version=0,
        last=False,
        paused=False,
        denominator=float(len(tokens)),
        tokens=tokens,
        labels=np.roll(tokens, -1),
        advantages=ones,
        behaviour_logprobs=-7 * ones,
        weights=ones,
        lags=np.zeros(len(tokens), np.int32),
        slopes=ones,
        forward_weights=0 * ones,
        top_ids=none.astype(np.int64),
        top_logprobs=none.astype(np.float32),
        row_offsets=np.arange(ROWS + 1) * length,
        sequence_offsets=np.append(0, np.cumsum(SEQUENCES * ROWS)),
        image_hashes=np.empty((0, 32), np.uint8),
        image_sizes=np.empty((0, 2), np.int64),
        image_starts=np.empty(0, np.int64),
    )


def compared(config: Config, result: Path) -> dict[str, dict[str, float]]:
    """By part: planned and measured bytes of the fullest rank."""
    measured = json.loads(result.read_text())
    shape = read_shape(config.student.model, "student.model")
    row = replace(row_of_check(), expert_imbalance=measured["imbalance"])
    stages = [stage_memory(config, shape, stage, row, ROWS) for stage in range(config.student.pipeline_parallel)]
    planned = {part: max(getattr(stage, part) for stage in stages) for part in PARTS[:-1]}
    planned[PARTS[-1]] = max(stage.activations + stage.workspace for stage in stages)
    return {part: {"planned": planned[part], "measured": measured[part]} for part in PARTS}


def show(found: dict[str, dict[str, dict[str, float]]]) -> None:
    """KiB as the plan says, and by how much the measurement differs from it."""
    table = Table("KiB", *PARTS)
    for name, parts in found.items():
        cells = [f"{v['planned'] / 1024:,.0f} {v['planned'] / v['measured'] - 1:+.1%}" for v in parts.values()]
        table.add_row(name, *cells)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
