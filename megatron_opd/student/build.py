"""From a Hugging Face folder and a config to a student that can be trained."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from mbridge import AutoBridge
from mbridge.core import Bridge
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import HAVE_TE, get_gpt_decoder_block_spec
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_opd.config import Config, StudentConfig
from megatron_opd.errors import ConfigError
from megatron_opd.runtime import env
from megatron_opd.runtime.vision import read_vision
from megatron_opd.student import bridges, cpu_runtime
from megatron_opd.student.head import return_hidden_states
from megatron_opd.student.sizes import check_sizes, check_world_size, has_experts, read_hf_config
from megatron_opd.student.torch_backend import decoder_spec
from megatron_opd.student.vision.build import build_seeing
from megatron_opd.student.vision.images import ImageReader
from megatron_opd.student.vision.tower import even_out

bridges.register()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}

BackendName = Literal["torch", "transformer_engine"]


@dataclass(frozen=True, slots=True)
class Model:
    """One rank's part of a model, with nothing that only training needs."""

    bridge: Bridge  # converts names and weights between Hugging Face and Megatron; knows vocab_size and dtype
    chunks: list[GPTModel]  # one, or one for each virtual pipeline stage of this rank
    backend: BackendName
    reason: str  # why this backend, one clause for a person


@dataclass(frozen=True, slots=True)
class Student:
    """One rank's part of the model that learns."""

    bridge: Bridge
    model: list[DistributedDataParallel]  # one chunk, or one for each virtual pipeline stage of this rank
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    backend: BackendName
    reason: str
    images: ImageReader | None = None  # None for a model that reads no images

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model[0].parameters()).device


def init_distributed(student: StudentConfig, seed: int, timeout_s: float = 1800.0) -> None:
    """Join the process group that torchrun describes in the environment, and Megatron's groups within it.

    ``seed``: of random numbers that Megatron draws; ``timeout_s``: longest wait in one collective. On a CPU this also
    installs ``cpu_runtime``, so call it from the thread that trains. Raises ConfigError when the number of ranks or
    the device does not fit the config.
    """
    check_world_size(student, env.world_size())
    torch.set_num_threads(student.threads_per_rank)
    if _device_type(student) == "cuda":
        torch.cuda.set_device(env.local_rank())
        backend = "nccl"
    else:
        cpu_runtime.install()
        backend = "gloo"
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, timeout=timeout)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=student.tensor_parallel,
        pipeline_model_parallel_size=student.pipeline_parallel,
        virtual_pipeline_model_parallel_size=student.virtual_pipeline if student.virtual_pipeline > 1 else None,
        context_parallel_size=student.context_parallel,
        expert_model_parallel_size=student.expert_parallel,
        expert_tensor_parallel_size=student.expert_tensor,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
    )
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def build_student(config: Config) -> Student:
    """Build, load and wrap this rank's part of the student. ``init_distributed`` comes first.

    Raises ModelError or ConfigError, before anything is built, for a model or sizes that do not fit.
    """
    check_sizes(config, read_hf_config(config.student.model))
    built = build_model(config.student)
    load_hf(built, config.student.model)
    model = _wrap([return_hidden_states(chunk) for chunk in built.chunks], built.bridge, config.student)
    optimizer, scheduler = _build_optimizer(config, model)
    vision = read_vision(config.student.model)
    reader = None if vision is None else ImageReader(config.images_folder, vision)
    return Student(built.bridge, model, optimizer, scheduler, built.backend, built.reason, reader)


def build_model(student: StudentConfig) -> Model:
    """Build this rank's part of the model, whose weights have yet to be loaded. ``init_distributed`` comes first.

    Raises ConfigError when the layers that ``student`` asks for cannot be used here.
    """
    backend, reason = _choose_backend(student)
    if student.fp8 is not None and backend == "torch":
        raise ConfigError(
            "Only Transformer Engine has 8-bit matrix products",
            where="student.fp8",
            got=f"{student.fp8}, but {reason}",
            fix="set student.fp8 to null",
        )
    bridge = _build_bridge(student, backend)
    parts = range(student.virtual_pipeline) if student.virtual_pipeline > 1 else [None]
    return Model(bridge, [_build_chunk(bridge, backend, student.train_vision, part) for part in parts], backend, reason)


def load_hf(model: Model, folder: Path) -> None:
    """Load the weights of a Hugging Face folder, one tensor after the other. All ranks call it."""
    model.bridge.load_weights(model.chunks, str(folder), memory_efficient=True)


def _device_type(student: StudentConfig) -> Literal["cpu", "cuda"]:
    available = torch.cuda.is_available()
    if student.device == "cuda" and not available:
        raise ConfigError(
            "No GPU is available to torch", where="student.device", got="cuda", fix="set student.device to auto or cpu"
        )
    if student.device == "auto":
        return "cuda" if available else "cpu"
    return student.device


def _choose_backend(student: StudentConfig) -> tuple[BackendName, str]:
    """Which layers, and why. Raises ConfigError when Transformer Engine is demanded and cannot be used."""
    if student.backend == "torch":
        return "torch", "student.backend asks for it"
    if _device_type(student) == "cpu":
        obstacle = "Transformer Engine needs a GPU"
    elif not HAVE_TE:
        obstacle = "Transformer Engine is not installed"
    else:
        return "transformer_engine", "a GPU and Transformer Engine are available"
    if student.backend == "transformer_engine":
        raise ConfigError(
            "The demanded layers cannot be used",
            where="student.backend",
            got=f"transformer_engine, but {obstacle}",
            fix="set student.backend to auto or torch",
        )
    return "torch", obstacle


def _build_bridge(student: StudentConfig, backend: BackendName) -> Bridge:
    bridge = AutoBridge.from_pretrained(
        str(student.model), dtype=DTYPES[student.dtype], make_vocab_size_divisible_by=student.tensor_parallel
    )
    # mbridge writes what it learns of one model into its class, and thus into the next model of the process.
    output = "model.embed_tokens.weight" if bridge.hf_config.tie_word_embeddings else "lm_head.weight"
    bridge._DIRECT_MAPPING = bridge._DIRECT_MAPPING | {"output_layer.weight": output}
    # mbridge sets these two only in its own model provider, and pads and cuts the vocabulary by them.
    bridge.vocab_size = bridge.hf_config.vocab_size
    bridge.padded_vocab_size = bridge.vocab_size + -bridge.vocab_size % student.tensor_parallel
    bridge.set_extra_args(
        sequence_parallel=student.sequence_parallel,
        variable_seq_lengths=True,  # rows differ in length
        fp8=student.fp8,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # The loss already holds the global denominator: gradients are summed over ranks and rows, never averaged.
        calculate_per_token_loss=True,
        finalize_model_grads_func=_sum_gradients,
        # Every weight is loaded.
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        **_experts(bridge.hf_config),
        **_RECOMPUTE[student.recompute],
        **_fusions(backend),
    )
    return bridge


def _experts(hf_config: Any) -> dict[str, Any]:
    """How tokens find their experts; nothing for a dense model."""
    if not has_experts(hf_config.to_dict()):
        return {}
    return {
        "moe_token_dispatcher_type": "alltoall",  # the only one for rows of different lengths
        "moe_router_load_balancing_type": "none",  # the loss is the recipe's alone
        "moe_router_pre_softmax": not hf_config.norm_topk_prob,  # normalised over the chosen experts, or over all
    }


def _fusions(backend: BackendName) -> dict[str, bool]:
    """Fused kernels: all that Transformer Engine brings, none that plain torch would have to compile."""
    names = (
        "apply_rope_fusion",
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "persist_layer_norm",
    )
    return dict.fromkeys(names, backend == "transformer_engine")


def _build_chunk(bridge: Bridge, backend: BackendName, train_vision: bool, part: int | None) -> GPTModel:
    """The layers of this pipeline stage; with virtual stages, of number ``part`` of this rank's."""
    hf_config = bridge.hf_config
    if backend == "transformer_engine":
        spec = get_gpt_decoder_block_spec(bridge.config, use_transformer_engine=True, vp_stage=part)
    else:
        spec = decoder_spec(bridge.config, part)
    options = {
        "config": bridge.config,
        "transformer_layer_spec": spec,
        "vocab_size": bridge.padded_vocab_size,
        "max_sequence_length": hf_config.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(ignore_virtual=part is None, vp_stage=part),
        "post_process": parallel_state.is_pipeline_last_stage(ignore_virtual=part is None, vp_stage=part),
        "share_embeddings_and_output_weights": hf_config.tie_word_embeddings,
        "vp_stage": part,
    }
    if bridges.sees(bridge):
        return build_seeing(bridge, train_vision, options)
    return GPTModel(**options, position_embedding_type="rope", **_rope(hf_config))


def _wrap(chunks: list[GPTModel], bridge: Bridge, student: StudentConfig) -> list[DistributedDataParallel]:
    """Give each chunk its buffers of gradients, and tell the schedule when to start reducing them."""
    settings = {
        "grad_reduce_in_fp32": True,
        "use_distributed_optimizer": True,  # with one copy too: a checkpoint then loads under any layout
        "overlap_grad_reduce": student.overlap_gradients,
        "overlap_param_gather": student.overlap_parameters,
    }
    model = [
        DistributedDataParallel(
            bridge.config,
            DistributedDataParallelConfig(**settings),
            chunk,
            disable_bucketing=number > 0,  # what later chunks send overlaps with the chunks before them anyway
        )
        for number, chunk in enumerate(chunks)
    ]
    if student.overlap_gradients:
        waits = [chunk.no_sync for chunk in model]  # until the last micro-batch
        bridge.config.no_sync_func = waits if len(waits) > 1 else waits[0]
    return model


def _rope(hf_config: Any) -> dict[str, Any]:
    """What GPTModel is told of the rotary angles: transformers 5 keeps it in one field, transformers 4 in two."""
    known = getattr(hf_config, "rope_parameters", None)
    known = known or {"rope_theta": hf_config.rope_theta, **(hf_config.rope_scaling or {})}
    scaled = known.get("rope_type") == "llama3"
    scaling = {"rope_scaling": True, "rope_scaling_factor": known["factor"]} if scaled else {}
    return {"rotary_base": known["rope_theta"], **scaling}


def _build_optimizer(
    config: Config, model: list[DistributedDataParallel]
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    options = config.optimizer
    settings = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        weight_decay=options.weight_decay,
        clip_grad=options.clip_grad,
        bf16=config.student.dtype == "bfloat16",
        params_dtype=DTYPES[config.student.dtype],
        use_distributed_optimizer=True,
        overlap_param_gather=config.student.overlap_parameters,
    )
    optimizer = get_megatron_optimizer(settings, model)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.warmup_steps,
        lr_decay_steps=config.steps,
        lr_decay_style=options.schedule,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return optimizer, scheduler


def _sum_gradients(model: list[DistributedDataParallel], num_tokens: object, **options: Any) -> None:
    """Megatron's reduction of gradients, without its division by ``num_tokens``."""
    finalize_model_grads(model, None, **options)
    even_out(model)


def _leave_as_is(weight: torch.Tensor) -> torch.Tensor:
    return weight
