"""Checks of a student's sizes that need neither torch nor Megatron: run them before starting anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_opd.config import Config, StudentConfig
from megatron_opd.errors import ConfigError, ModelError

# Dense decoders that mbridge converts and decoder_spec builds.
MODEL_TYPES = ("llama", "qwen2", "qwen3")

# Fields of config.json that change the arithmetic and that the conversion does not carry over.
_FIXED_FIELDS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}


def read_hf_config(folder: Path) -> dict[str, Any]:
    """Parsed config.json of a Hugging Face folder. Raises ModelError when there is none, or no JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            "The model's folder has no config.json" if folder.is_dir() else "The model's folder does not exist",
            where=path.absolute(),
            fix="give a Hugging Face checkpoint folder",
        )
    try:
        hf_config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError("The model's config.json is not JSON", where=path.absolute(), got=error) from error
    if not isinstance(hf_config, dict):
        raise ModelError("The model's config.json is not a JSON object", where=path.absolute())
    return hf_config


def check_sizes(config: Config, hf_config: dict[str, Any]) -> None:
    """Check that the model of ``hf_config`` can be split and trained as ``config`` says.

    Raises ModelError for a model that the student cannot build, ConfigError for sizes or a schedule that do not fit.
    """
    _check_model(config, hf_config)
    _check_split(config, hf_config)
    _check_schedule(config)


def check_world_size(student: StudentConfig, world_size: int) -> None:
    """Raise ConfigError unless ``world_size`` ranks are what the config asks for."""
    expected = student.tensor_parallel * student.data_parallel
    if world_size != expected:
        raise ConfigError(
            "The number of ranks does not fit the parallel sizes",
            where="student.tensor_parallel, student.data_parallel",
            got=f"{world_size} ranks",
            expected=f"{expected} = {student.tensor_parallel} tensor parallel * {student.data_parallel} data parallel",
            fix=f"start {expected} ranks, or change the sizes",
        )


def _check_model(config: Config, hf_config: dict[str, Any]) -> None:
    where = config.student.model / "config.json"
    model_type = hf_config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelError(
            "The student's model type is not supported",
            where=f"{where}: model_type",
            got=model_type,
            expected=" or ".join(MODEL_TYPES),
        )
    for field, expected in _FIXED_FIELDS.items():
        if hf_config.get(field, expected) != expected:
            raise ModelError(
                "The student uses a feature that is not supported",
                where=f"{where}: {field}",
                got=hf_config[field],
                expected=expected,
            )
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ModelError(
            "The student's rotary embedding is scaled, which is not supported",
            where=f"{where}: rope_parameters",
            got=rope_type,
            expected="default",
        )


def _check_split(config: Config, hf_config: dict[str, Any]) -> None:
    student = config.student
    heads = _size(config, hf_config, "num_attention_heads")
    sizes = {
        "attention heads": heads,
        "key-value heads": hf_config.get("num_key_value_heads") or heads,
        "feed-forward units": _size(config, hf_config, "intermediate_size"),
    }
    for name, size in sizes.items():
        if size % student.tensor_parallel:
            raise ConfigError(
                f"The {name} cannot be split evenly over tensor-parallel ranks",
                where="student.tensor_parallel",
                got=f"{size} {name} over {student.tensor_parallel} ranks",
                expected=f"a divisor of {size}",
            )
    if student.sequence_parallel and student.tensor_parallel == 1:
        raise ConfigError(
            "Sequence parallelism needs tensor parallelism",
            where="student.sequence_parallel",
            got="true with student.tensor_parallel 1",
            fix="set student.sequence_parallel to false, or student.tensor_parallel to 2 or more",
        )


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.warmup_steps >= config.steps:
        raise ConfigError(
            "The warm-up is not shorter than the run",
            where="optimizer.warmup_steps",
            got=f"{optimizer.warmup_steps} warm-up steps of {config.steps} steps",
            fix="lower optimizer.warmup_steps",
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            "The lowest learning rate is above the peak",
            where="optimizer.min_lr",
            got=optimizer.min_lr,
            expected=f"at most optimizer.lr = {optimizer.lr}",
        )


def _size(config: Config, hf_config: dict[str, Any], field: str) -> int:
    size = hf_config.get(field)
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            "The student's config.json lacks a size",
            where=f"{config.student.model / 'config.json'}: {field}",
            got=size,
            expected="a positive whole number",
        )
    return size
