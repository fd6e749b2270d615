"""Checks of a student's sizes that need neither torch nor Megatron: run them before starting anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_opd.config import Config, StudentConfig
from megatron_opd.errors import ConfigError, ModelError, OpdError, raise_together
from megatron_opd.runtime.vision import text_config
from megatron_opd.student.vision_sizes import VISION_TYPES, check_vision, vision_mistakes

# Decoders that mbridge converts and decoder_spec builds, and those with a vision tower in front.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *VISION_TYPES)

# Fields of config.json that change the arithmetic and that the conversion does not carry over.
_FIXED_FIELDS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_sliding_window": False}
_LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}  # Megatron's own
_MISTRAL_WINDOW = 4096  # of a config.json that names none, in transformers
_FIXED_EXPERT_FIELDS = {"decoder_sparse_step": 1, "mlp_only_layers": []}  # every layer has experts


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

    Raises ModelError for a model that the student cannot build, ConfigError for sizes or a schedule that do not fit;
    when more than one thing is wrong, a ConfigError that lists all.
    """
    raise_together(size_mistakes(config, hf_config))


def size_mistakes(config: Config, hf_config: dict[str, Any]) -> list[OpdError]:
    """What ``check_sizes`` would raise, a list of all. Sizes are looked at only where the model is one we build."""
    found = student_mistakes(config.student, hf_config)
    return found if any(isinstance(error, ModelError) for error in found) else [*found, *_schedule_mistakes(config)]


def student_mistakes(student: StudentConfig, hf_config: dict[str, Any]) -> list[OpdError]:
    """What is wrong with the model, or else with how ``student`` spreads it over ranks."""
    try:
        _check_model(student, hf_config)
        split = list(_split_mistakes(student, hf_config))
    except ModelError as error:
        return [error]
    return [*split, *_layout_mistakes(student), *vision_mistakes(student, hf_config)]


def check_world_size(student: StudentConfig, world_size: int) -> None:
    """Raise ConfigError unless ``world_size`` ranks are what the config asks for."""
    if world_size != student.ranks:
        sizes = ("tensor_parallel", "pipeline_parallel", "context_parallel", "data_parallel")
        product = " * ".join(f"{getattr(student, size)} {size.replace('_', ' ')}" for size in sizes)
        raise ConfigError(
            "The number of ranks does not fit the parallel sizes",
            where=", ".join(f"student.{size}" for size in sizes),
            got=f"{world_size} ranks",
            expected=f"{student.ranks} = {product}",
            fix=f"start {student.ranks} ranks, or change the sizes",
        )


def _check_model(student: StudentConfig, hf_config: dict[str, Any]) -> None:
    where = student.model / "config.json"
    model_type = hf_config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ModelError(
            "The student's model type is not supported",
            where=f"{where}: model_type",
            got=model_type,
            expected=" or ".join(MODEL_TYPES),
        )
    text = text_config(hf_config)
    fixed = _FIXED_FIELDS | (_FIXED_EXPERT_FIELDS if has_experts(hf_config) else {})
    for field, expected in fixed.items():
        if text.get(field, expected) != expected:
            raise ModelError(
                "The student uses a feature that is not supported",
                where=f"{where}: {_path(hf_config, field)}",
                got=text[field],
                expected=expected,
            )
    if model_type in VISION_TYPES:
        check_vision(student.model, hf_config)
    else:
        _check_rope(where, hf_config)
    if model_type == "mistral":
        _check_window(where, hf_config)


def _check_rope(where: Path, hf_config: dict[str, Any]) -> None:
    """Raise ModelError unless the rotary angles are plain, or scaled in the one way that Megatron knows."""
    rope = hf_config.get("rope_parameters") or hf_config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" or (kind == "llama3" and all(rope.get(key) == value for key, value in _LLAMA3_ROPE.items())):
        return
    raise ModelError(
        "The student's rotary embedding is scaled in a way that is not supported",
        where=f"{where}: rope_parameters",
        got=rope,
        expected=f"rope_type default, or llama3 with {_LLAMA3_ROPE} and any factor",
    )


def _check_window(where: Path, hf_config: dict[str, Any]) -> None:
    """Raise ModelError when a token could be further away than the attention of Mistral's layers reaches."""
    window = hf_config.get("sliding_window", _MISTRAL_WINDOW)
    context = hf_config.get("max_position_embeddings")
    if window is None or (context is not None and context <= window):
        return
    raise ModelError(
        "The student's attention reaches less far than its context, which is not supported",
        where=f"{where}: sliding_window, max_position_embeddings",
        got=f"a window of {window} tokens in a context of {'unknown size' if context is None else context}",
        expected="sliding_window null, or at least max_position_embeddings",
        fix=f"where no sequence is longer than that, set max_position_embeddings to {window}",
    )


def has_experts(hf_config: dict[str, Any]) -> bool:
    """Whether the model of a config.json is a mixture of experts."""
    return str(hf_config.get("model_type")).endswith("_moe")


def experts_field(hf_config: dict[str, Any]) -> str:
    """Under which name a config.json has the number of experts: that of transformers 4 or 5."""
    return "num_experts" if "num_experts" in hf_config else "num_local_experts"


def _split_mistakes(student: StudentConfig, hf_config: dict[str, Any]) -> Iterator[OpdError]:
    """Sizes of the model that the ranks cannot share evenly."""

    def size(field: str) -> int:
        return read_size(student.model, hf_config, field)

    heads = size("num_attention_heads")
    groups = text_config(hf_config).get("num_key_value_heads") or heads
    tensor, stages = student.tensor_parallel, student.pipeline_parallel * student.virtual_pipeline
    shares = [
        ("attention heads", heads, tensor, "tensor-parallel ranks", "tensor_parallel"),
        ("key-value heads", groups, tensor, "tensor-parallel ranks", "tensor_parallel"),
        ("layers", size("num_hidden_layers"), stages, "pipeline stages", "pipeline_parallel, student.virtual_pipeline"),
    ]
    if has_experts(hf_config):
        shares += [
            (
                "experts",
                size(experts_field(hf_config)),
                student.expert_parallel,
                "expert-parallel ranks",
                "expert_parallel",
            ),
            (
                "feed-forward units of an expert",
                size("moe_intermediate_size"),
                student.expert_tensor,
                "expert-tensor-parallel ranks",
                "expert_tensor_parallel",
            ),
        ]
    else:
        shares.append(
            ("feed-forward units", size("intermediate_size"), tensor, "tensor-parallel ranks", "tensor_parallel")
        )
    for name, whole, ranks, kind, key in shares:
        if whole % ranks:
            yield ConfigError(
                f"The {name} cannot be split evenly over {kind}",
                where=f"student.{key}",
                got=f"{whole} {name} over {ranks} {kind}",
                expected=f"a divisor of {whole}",
            )
    yield from _expert_mistakes(student, has_experts(hf_config))


def _expert_mistakes(student: StudentConfig, experts: bool) -> Iterator[OpdError]:
    """Expert sizes that Megatron's groups do not allow."""
    if not experts:
        if student.expert_parallel > 1 or student.expert_tensor_parallel is not None:
            yield ConfigError(
                "A model without experts cannot be split over expert-parallel ranks",
                where="student.expert_parallel, student.expert_tensor_parallel",
                got=f"{student.expert_parallel} and {student.expert_tensor_parallel}",
                expected="1 and null",
            )
        return
    if student.copies % student.expert_parallel:
        yield ConfigError(
            "Expert-parallel ranks are taken out of the copies of the student, and do not divide them",
            where="student.expert_parallel",
            got=f"{student.expert_parallel} expert-parallel ranks of {student.copies} copies",
            expected=f"a divisor of {student.copies} = {student.data_parallel} data parallel * "
            f"{student.context_parallel} context parallel",
        )
    if student.expert_tensor not in (1, student.tensor_parallel):
        yield ConfigError(
            "The matrices of an expert are split as all others, or not at all",
            where="student.expert_tensor_parallel",
            got=student.expert_tensor,
            expected=f"1 or student.tensor_parallel = {student.tensor_parallel}",
        )
    elif student.expert_tensor != student.tensor_parallel and student.expert_parallel == 1:
        yield ConfigError(
            "Megatron sums the gradients of undivided experts over tensor-parallel ranks only with expert parallelism",
            where="student.expert_tensor_parallel",
            got=f"{student.expert_tensor} with student.tensor_parallel {student.tensor_parallel} "
            "and student.expert_parallel 1",
            fix="set student.expert_tensor_parallel to null, or student.expert_parallel to 2 or more",
        )
    if student.tensor_parallel > 1 and not student.sequence_parallel:
        yield ConfigError(
            "Megatron trains experts under tensor parallelism only with sequence parallelism",
            where="student.sequence_parallel",
            got=f"false with student.tensor_parallel {student.tensor_parallel}",
            fix="set student.sequence_parallel to true",
        )


def _layout_mistakes(student: StudentConfig) -> Iterator[OpdError]:
    """Parallel sizes and switches that contradict each other, whatever the model."""
    rules: list[tuple[bool, str, str, str, str]] = [
        (
            student.sequence_parallel and student.tensor_parallel == 1,
            "Sequence parallelism needs tensor parallelism",
            "sequence_parallel",
            "true with student.tensor_parallel 1",
            "set student.sequence_parallel to false, or student.tensor_parallel to 2 or more",
        ),
        (
            student.virtual_pipeline > 1 and student.pipeline_parallel == 1,
            "Virtual pipeline stages need pipeline parallelism",
            "virtual_pipeline",
            f"{student.virtual_pipeline} with student.pipeline_parallel 1",
            "set student.virtual_pipeline to 1, or student.pipeline_parallel to 2 or more",
        ),
        (
            (student.overlap_gradients or student.overlap_parameters) and student.copies == 1,
            "There is nothing to overlap: a single copy of the student sends no gradients and no weights",
            "overlap_gradients, student.overlap_parameters",
            "true with student.data_parallel 1 and student.context_parallel 1",
            "set both to false",
        ),
        (
            student.overlap_parameters and not student.overlap_gradients,
            "Megatron overlaps the gathering of weights only together with the reduction of gradients",
            "overlap_parameters",
            "true with student.overlap_gradients false",
            "set student.overlap_gradients to true",
        ),
        (
            student.fp8 is not None and (student.backend == "torch" or student.device == "cpu"),
            "Only Transformer Engine on a GPU has 8-bit matrix products",
            "fp8",
            f"{student.fp8} with student.backend {student.backend} and student.device {student.device}",
            "set student.fp8 to null",
        ),
    ]
    for broken, what, key, got, fix in rules:
        if broken:
            yield ConfigError(what, where=f"student.{key}", got=got, fix=fix)


def _schedule_mistakes(config: Config) -> Iterator[OpdError]:
    optimizer = config.optimizer
    if optimizer.warmup_steps >= config.steps:
        yield ConfigError(
            "The warm-up is not shorter than the run",
            where="optimizer.warmup_steps",
            got=f"{optimizer.warmup_steps} warm-up steps of {config.steps} steps",
            fix="lower optimizer.warmup_steps",
        )
    if optimizer.min_lr > optimizer.lr:
        yield ConfigError(
            "The lowest learning rate is above the peak",
            where="optimizer.min_lr",
            got=optimizer.min_lr,
            expected=f"at most optimizer.lr = {optimizer.lr}",
        )


def read_size(model: Path, hf_config: dict[str, Any], field: str) -> int:
    """A size of the language model out of the config.json of the folder ``model``. Raises ModelError for none."""
    size = text_config(hf_config).get(field)
    if not isinstance(size, int) or size < 1:
        raise ModelError(
            "The student's config.json lacks a size",
            where=f"{model / 'config.json'}: {_path(hf_config, field)}",
            got=size,
            expected="a positive whole number",
        )
    return size


def _path(hf_config: dict[str, Any], field: str) -> str:
    """Where in config.json a field of the language model is."""
    return field if text_config(hf_config) is hf_config else f"text_config.{field}"
