"""Checks before anything starts: every mistake is named with both numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_opd.config import Config, parse_config
from megatron_opd.errors import ConfigError, ModelError
from megatron_opd.student.sizes import check_sizes, check_world_size, read_hf_config

QWEN = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 30,
    "num_hidden_layers": 6,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
}


EXPERTS = {**QWEN, "model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 10}


LLAMA3 = {
    **{"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    **{"original_max_position_embeddings": 8192, "rope_theta": 5e5},
}


def config(optimizer: dict[str, Any] | None = None, **student: Any) -> Config:
    plain = {
        "name": "test",
        "steps": 10,
        "student": {"model": "model", **student},
        "optimizer": optimizer or {},
        "teachers": {"math": {"model": "teacher"}},
        "data": {"train": "train.jsonl"},
    }
    return parse_config(plain, where="test")


def test_good_sizes_pass() -> None:
    check_sizes(config(), QWEN)
    check_sizes(config(), {**QWEN, "rope_parameters": LLAMA3})
    check_sizes(config(tensor_parallel=2, sequence_parallel=True), QWEN)


@pytest.mark.parametrize(
    ("ranks", "name", "size"), [(5, "attention heads", 12), (3, "key-value heads", 4), (4, "feed-forward units", 30)]
)
def test_uneven_split(ranks: int, name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"{size} {name} over {ranks} tensor-parallel ranks"):
        check_sizes(config(tensor_parallel=ranks), QWEN)


def test_missing_key_value_heads_mean_all_heads() -> None:
    check_sizes(config(tensor_parallel=6), {**QWEN, "num_key_value_heads": None})


def test_wrong_world_size_names_both_numbers() -> None:
    student = config(tensor_parallel=2, data_parallel=3).student
    check_world_size(student, 6)
    with pytest.raises(ConfigError) as caught:
        check_world_size(student, 4)
    assert "4 ranks" in str(caught.value)
    assert "6 = 2 tensor parallel * 1 pipeline parallel * 1 context parallel * 3 data parallel" in str(caught.value)


def test_sequence_parallel_needs_tensor_parallel() -> None:
    with pytest.raises(ConfigError, match="needs tensor parallelism"):
        check_sizes(config(sequence_parallel=True), QWEN)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [({"warmup_steps": 10}, "10 warm-up steps of 10 steps"), ({"lr": 1e-6, "min_lr": 1e-5}, "at most optimizer.lr")],
)
def test_impossible_schedule(optimizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(config(optimizer), QWEN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt_bigcode"}, "model type is not supported"),
        ({"model_type": None}, "model type is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {**LLAMA3, "high_freq_factor": 8.0}}, "high_freq_factor': 8.0"),
        ({"num_attention_heads": None}, "lacks a size"),
    ],
)
def test_unsupported_models(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        check_sizes(config(), {**QWEN, **change})


def test_read_hf_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        read_hf_config(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        read_hf_config(tmp_path)
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ModelError, match="is not JSON"):
        read_hf_config(tmp_path)
    path.write_text(json.dumps(QWEN))
    assert read_hf_config(tmp_path) == QWEN


def test_supervisor_needs_neither_torch_nor_megatron() -> None:
    code = "import sys, megatron_opd.student.sizes; assert not {'torch', 'megatron', 'mbridge'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"pipeline_parallel": 4}, "6 layers over 4 pipeline stages"),
        ({"pipeline_parallel": 2, "virtual_pipeline": 2}, "6 layers over 4 pipeline stages"),
        ({"virtual_pipeline": 2}, "2 with student.pipeline_parallel 1"),
        ({"overlap_gradients": True}, "nothing to overlap"),
        ({"overlap_parameters": True, "data_parallel": 2}, "true with student.overlap_gradients false"),
        ({"fp8": "hybrid", "backend": "torch"}, "hybrid with student.backend torch"),
        ({"expert_parallel": 2}, "model without experts"),
    ],
)
def test_impossible_layout(student: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(config(**student), QWEN)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"expert_parallel": 3, "data_parallel": 3}, "8 experts over 3 expert-parallel ranks"),
        ({"expert_parallel": 2, "data_parallel": 3}, "2 expert-parallel ranks of 3 copies"),
        ({"expert_parallel": 2, "context_parallel": 3}, "2 expert-parallel ranks of 3 copies"),
        ({"tensor_parallel": 2}, "false with student.tensor_parallel 2"),
        ({"tensor_parallel": 4, "sequence_parallel": True}, "10 feed-forward units of an expert over 4"),
        ({"expert_tensor_parallel": 2}, "1 or student.tensor_parallel = 1"),
        (
            {"expert_tensor_parallel": 1, "tensor_parallel": 2, "sequence_parallel": True},
            "1 with student.tensor_parallel 2 and student.expert_parallel 1",
        ),
    ],
)
def test_impossible_expert_layout(student: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sizes(config(**student), EXPERTS)


def test_good_expert_layouts() -> None:
    check_sizes(config(expert_parallel=4, data_parallel=2, context_parallel=2), EXPERTS)
    undivided = {"expert_tensor_parallel": 1, "expert_parallel": 2, "data_parallel": 2}
    check_sizes(config(**undivided, tensor_parallel=2, sequence_parallel=True), EXPERTS)
    with pytest.raises(ModelError, match="mlp_only_layers"):
        check_sizes(config(), {**EXPERTS, "mlp_only_layers": [0]})


def test_all_mistakes_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_sizes(config({"warmup_steps": 10}, tensor_parallel=5, pipeline_parallel=4, virtual_pipeline=2), QWEN)
    for mistake in ("12 attention heads over 5", "4 key-value heads over 5", "6 layers over 8", "10 warm-up steps"):
        assert mistake in str(caught.value)


def test_world_size_counts_every_kind_of_rank() -> None:
    sizes = {"tensor_parallel": 2, "pipeline_parallel": 3, "context_parallel": 5, "data_parallel": 7}
    assert config(**sizes, expert_parallel=5, virtual_pipeline=2).world_size == 210
