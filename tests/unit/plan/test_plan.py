"""The plan's arithmetic: against public numbers, against counting, and as a person calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_opd.config import Config, load_config
from megatron_opd.errors import ConfigError, ModelError
from megatron_opd.plan.activations import MicroBatch
from megatron_opd.plan.assumptions import parse_assumptions
from megatron_opd.plan.command import plan, plan_json
from megatron_opd.plan.estimate import Plan, make_plan, make_setting, read_models
from megatron_opd.plan.hardware import GPUS, find_gpu
from megatron_opd.plan.layouts import compare_layouts
from megatron_opd.plan.lengths import Lengths
from megatron_opd.plan.memory import in_flight, plain_logits_bytes
from megatron_opd.plan.scale import best_division
from megatron_opd.plan.shape import read_shape
from megatron_opd.plan.training import refresh_seconds

ROOT = Path(__file__).resolve().parents[3]
MODELS = ROOT / "conf/plan/models"
GIB = 2**30


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # model folders of conf/plan are relative


def config_of(*overrides: str, name: str = "qwen3_4b") -> Config:
    return load_config(ROOT / f"conf/plan/{name}.yaml", list(overrides))


def plan_of(*overrides: str, gpu: str = "h100", assume: tuple[str, ...] = ()) -> Plan:
    config = config_of(*overrides)
    return make_plan(make_setting(config, find_gpu(gpu), parse_assumptions(list(assume))), read_models(config))


@pytest.mark.parametrize(
    ("name", "params", "per_token"),
    [
        ("Qwen3-1.7B", 1.72e9, 1.72e9),  # model cards: 1.7 B, 1.4 B without the embedding, and so on
        ("Qwen3-4B", 4.02e9, 4.02e9),
        ("Qwen3-8B", 8.19e9, 7.57e9),
        ("Qwen3-32B", 32.76e9, 31.98e9),
        ("Qwen3-30B-A3B", 30.53e9, 3.04e9),
        ("Qwen3-235B-A22B", 235.09e9, 21.57e9),
    ],
)
def test_parameters_of_public_models(name: str, params: float, per_token: float) -> None:
    shape = read_shape(MODELS / name, "student.model")
    assert shape.params == pytest.approx(params, rel=2e-3)
    assert shape.body_params + shape.head_params == pytest.approx(per_token, rel=2e-3)


@pytest.mark.parametrize(("mean", "longest"), [(10, 1000), (300, 1000), (500, 1000), (900, 1000), (1000, 1000)])
def test_lengths_have_their_mean(mean: float, longest: float) -> None:
    lengths = Lengths(mean, longest)
    survival = lengths.survival()
    assert survival.sum() * longest / len(survival) == pytest.approx(mean, rel=0.01)
    assert np.all(np.diff(survival) <= 0) and survival.max() <= 1
    assert lengths.mean_square(0) >= mean**2 * 0.99


def test_a_mean_of_half_the_longest_is_uniform() -> None:
    assert Lengths(500, 1000).mean_square(0) == pytest.approx(1000**2 / 3, rel=0.01)
    assert Lengths(500, 1000).mean_square(200) == pytest.approx((1200**3 - 200**3) / 3000, rel=0.01)


@pytest.mark.parametrize(
    ("stages", "parts", "rows", "expected"),
    [
        (1, 1, 9, [1]),
        (4, 1, 9, [4, 3, 2, 1]),
        (4, 1, 2, [2, 2, 2, 1]),
        (2, 2, 8, [5 / 2, 3 / 2]),  # Megatron: 2 (stages - stage - 1) + (parts - 1) stages of warm-up, and one more
        (2, 2, 1, [2, 3 / 2]),  # filled up to two rows
    ],
)
def test_micro_batches_in_flight(stages: int, parts: int, rows: int, expected: list[float]) -> None:
    student = config_of(f"student.pipeline_parallel={stages}", f"student.virtual_pipeline={parts}").student
    assert [in_flight(student, stage, rows) for stage in range(stages)] == expected


def test_published_sizes_of_logits() -> None:
    """One float32 tensor of 8,192 x 151,936: 4.64 GiB (NeMo RL issue 3314)."""
    shape = read_shape(MODELS / "Qwen3-8B", "student.model")
    student = config_of("student.dtype=float32", "student.tensor_parallel=1", "student.sequence_parallel=false").student
    assert plain_logits_bytes(shape, student, MicroBatch(8192, 0)) / 4 / GIB == pytest.approx(4.64, abs=0.01)


def test_published_seconds_of_a_refresh() -> None:
    """Qwen3-30B-A3B by NCCL on H100: 2.67 s (miles). Ours is for one card at 70 %; it must be of that order."""
    shape = read_shape(MODELS / "Qwen3-30B-A3B", "student.model")
    assert 0.5 <= refresh_seconds(shape, "bfloat16", parse_assumptions([])) / 2.67 <= 2


def test_operations_by_counting() -> None:
    """Without attention, a dense model does 2 operations a parameter and token forward, twice that backward."""
    found = plan_of("rollout.max_new_tokens=2", "student.recompute=none", assume=("prompt_tokens=2",))
    step, shape = found.setting.step, found.models.student
    assert step.trained == 64 * 16 * (2 + 1)
    assert step.scored_tokens == 64 * (2 + 16 * 1)  # a group's prompt is read once
    matrices = shape.body_params + shape.head_params
    assert found.operations.forward == pytest.approx(2 * matrices * step.trained, rel=1e-3)  # attention is the rest
    assert found.operations.backward == 2 * found.operations.forward
    assert found.operations.recompute == 2 * shape.head_params * step.trained


def test_balancing_decides_what_teachers_read() -> None:
    before = plan_of(assume=("kept_share=0.5",)).setting.step
    after = plan_of("balance.order=after_scoring", assume=("kept_share=0.5",)).setting.step
    assert (before.scored, after.scored, before.trained) == (512, 1024, after.trained)


def test_sequential_is_the_sum_and_overlapped_the_slowest() -> None:
    found = plan_of(assume=("rollout_gpus=8", "teacher_gpus=2"))
    time = found.time
    assert found.gpus == 16 + 8 + 2 * 2
    assert time.sequential == time.generate + time.score + time.train + time.refresh
    assert time.overlapped == max(time.generate + time.refresh, time.score, time.train + time.refresh)
    assert getattr(time, time.bottleneck) == max(time.generate, time.score, time.train)


def test_more_engines_help_until_the_longest_response_decides() -> None:
    seconds = [plan_of(assume=(f"rollout_gpus={gpus}",)).rollout.seconds for gpus in (1, 8, 512, 1024)]
    assert seconds[1] < seconds[0] / 4
    assert seconds[3] > 0.9 * seconds[2]


def test_a_gpu_that_is_too_small_is_told_with_both_numbers() -> None:
    found = plan_of("student.data_parallel=1", "student.recompute=none", gpu="rtx4090")
    assert not found.student.fits
    assert any("student: a rank needs" in problem and "of 21.2 GiB" in problem for problem in found.problems)
    assert any("outside engine.memory_fraction" in problem for problem in found.problems)


def test_layouts_are_ranked_and_refused_with_numbers() -> None:
    config = config_of()
    setting = make_setting(config, find_gpu("a100-40"), parse_assumptions([]))
    found = compare_layouts(setting, read_models(config), 16)
    times = [candidate.plan.time.total for candidate in found.fitting]
    assert times == sorted(times) and len(times) > 10
    assert all(candidate.student.ranks == 16 and candidate.plan.fits for candidate in found.fitting)
    reasons = {refusal.what: refusal.numbers for refusal in found.refused}
    assert "GiB on a rank, 35.9 GiB usable" in reasons["It does not fit into a GPU's memory"]
    layers = reasons["The layers cannot be split evenly over pipeline stages"]
    assert "36 layers over" in layers and "a divisor of 36" in layers


def test_the_best_division_uses_all_gpus_and_beats_an_even_one() -> None:
    config = config_of()
    setting = make_setting(config, find_gpu("h100"), parse_assumptions([]))
    best = best_division(setting, read_models(config), 16)
    assert best is not None
    assert best.student.student.ranks + best.rollout.gpus + sum(server.gpus for server in best.frozen) == 16
    even = plan_of("student.data_parallel=4", assume=("rollout_gpus=4", "teacher_gpus=2"))
    assert even.gpus == 16 and best.time.sequential < even.time.sequential


@pytest.mark.parametrize("item", ["respone_tokens=1", "kept_share=2", "gpus_per_node=many"])
def test_a_wrong_assumption_is_refused_by_name(item: str) -> None:
    with pytest.raises(ConfigError, match=item.split("=")[0]):
        parse_assumptions([item])


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="longer than the longest"):
        plan_of(assume=("response_tokens=20000",))
    with pytest.raises(ConfigError, match="multiple of"):
        plan_of("rollout.server.tensor_parallel=2", assume=("rollout_gpus=3",))
    with pytest.raises(ConfigError, match="h100"):
        find_gpu("h1000")
    with pytest.raises(ConfigError, match="Two different questions"):
        plan(config_of(), "h100", [], layouts=True, scaled=True, as_json=False)
    with pytest.raises(ModelError) as found:
        read_models(config_of("student.model=nowhere"))
    assert "conf/plan/models" in str(found.value)


def test_every_gpu_names_its_source() -> None:
    assert all(gpu.source and gpu.bf16_tflops > gpu.fp32_tflops for gpu in GPUS.values())


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; from megatron_opd.cli import app; app(sys.argv[1:], standalone_mode=False); "
        "assert not {'torch', 'transformers', 'megatron'} & set(sys.modules)"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "plan", *arguments], check=False, capture_output=True, text=True, timeout=120
    )


def test_the_toy_is_planned_without_options_and_without_torch() -> None:
    done = call("conf/toy.yaml")
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 100
    for part in ("Memory of a student's rank", "activations", "<- bottleneck", "GPU-hours", "prompt_tokens"):
        assert part in done.stdout


def test_json_says_what_the_tables_say() -> None:
    done = call("conf/plan/qwen3_4b.yaml", "--json", "--assume", "rollout_gpus=8")
    found: dict[str, Any] = json.loads(done.stdout)
    assert found == json.loads(json.dumps(plan_json(plan_of(assume=("rollout_gpus=8",)))))
    assert found["fits"] and found["assumptions"]["rollout_gpus"] == 8
