"""Everything that can be known to be wrong before a process is started, told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_opd.config import Config, TeacherConfig
from megatron_opd.data.inputs import check_inputs
from megatron_opd.data.tokenizer import load_tokenizer, same_template, same_tokenizer
from megatron_opd.engines.command import check_engine_python, resolve_device
from megatron_opd.engines.vllm_command import check_vllm_python
from megatron_opd.errors import ConfigError, ModelError, OpdError, raise_together
from megatron_opd.observe.sinks import check_sinks
from megatron_opd.runtime.env import secret
from megatron_opd.runtime.vision import text_config
from megatron_opd.student.hf_weights import weight_mistakes
from megatron_opd.student.sizes import read_hf_config, size_mistakes
from megatron_opd.train.vision_checks import vision_mistakes


def preflight(config: Config) -> None:
    """Check models, tokenizers, sizes and data. Raises OpdError: the one mistake, or a list of all."""
    raise_together(list(_mistakes(config)))


def _mistakes(config: Config) -> Iterator[OpdError]:
    yield from attempt(lambda: check_sinks(config.sinks))
    yield from server_mistakes(config)
    missing = list(missing_models(config))
    yield from missing
    if missing:
        return  # what follows reads the models
    yield from model_mistakes(config)
    yield from fit_mistakes(config)
    yield from tokenizer_mistakes(config)
    yield from attempt(lambda: check_inputs(config, load_tokenizer(config.student.model)))


def frozen_models(config: Config) -> dict[str, TeacherConfig]:
    """Teachers and the free reference, by their key."""
    frozen = {f"teachers.{domain}": teacher for domain, teacher in config.teachers.items()}
    return frozen | ({"reference": config.reference} if config.reference else {})


def models_of(config: Config) -> dict[str, Path]:
    """The folder of every model, by the part of the config that names it."""
    frozen = {f"{key}.model": teacher.model for key, teacher in frozen_models(config).items()}
    return {"student.model": config.student.model} | frozen


def missing_models(config: Config) -> Iterator[OpdError]:
    """Folders that hold no checkpoint."""
    for key, model in models_of(config).items():
        yield from attempt(lambda k=key, m=model: check_model(k, m))


def model_mistakes(config: Config) -> list[OpdError]:
    """What is wrong with the student's sizes, and with its weights where its model is one that we build."""
    hf_config = read_hf_config(config.student.model)
    sizes = size_mistakes(config, hf_config)
    known = not any(isinstance(error, ModelError) for error in sizes)
    return [*sizes, *(weight_mistakes(config.student.model, hf_config) if known else [])]


def fit_mistakes(config: Config) -> Iterator[OpdError]:
    """Models, all there, that cannot take what the run would ask of them."""
    for key, model in models_of(config).items():
        yield from attempt(lambda k=key, m=model: check_context(k, m, longest_of(config)))
        yield from attempt(lambda k=key, m=model: _check_top_k(k, m, config.scoring.top_k))
    seen: list[OpdError] = []
    yield from attempt(lambda: seen.extend(vision_mistakes(config, frozen_models(config))))
    yield from seen


def tokenizer_mistakes(config: Config) -> Iterator[OpdError]:
    """Models, all there, whose tokenizer or chat template is not the student's."""
    for key, teacher in frozen_models(config).items():
        yield from attempt(lambda t=teacher: same_tokenizer(config.student.model, t.model))
        if not teacher.other_template:
            yield from attempt(lambda k=key, t=teacher: same_template(config.student.model, t.model, k))


def server_mistakes(config: Config) -> Iterator[OpdError]:
    """Environments that are lacking: of engines to start, and of keys of engines to attach to."""
    servers = {"rollout.server": config.rollout.server} | config.frozen_servers
    engines = {server.engine for server in servers.values() if not server.urls}
    checks = {"sglang": check_engine_python, "vllm": check_vllm_python}
    for engine in sorted(engines):
        yield from attempt(lambda e=engine: checks[e](config.engine))
    for server in servers.values():
        if server.api_key_env is not None:
            yield from attempt(lambda s=server: secret(s.api_key_env))
    on_gpu = resolve_device(config.engine.device) == "cuda"
    for key in [key for key, server in servers.items() if on_gpu and server.replicas > 1 and server.gpus is None]:
        yield ConfigError(
            "Several servers would share the same GPUs",
            where=f"{key}.gpus",
            got="null",
            expected=f"GPUs for {servers[key].replicas} replicas",
            fix=f'set {key}.gpus, for example "0,1"; they are dealt out evenly, in order',
        )


def attempt(check: Callable[[], object]) -> list[OpdError]:
    """What is wrong, as a list of none or one."""
    try:
        check()
    except OpdError as error:
        return [error]
    return []


def check_model(key: str, model: Path) -> None:
    """Raise ModelError unless ``model`` is the folder of a checkpoint with weights."""
    if not (model / "config.json").is_file():
        raise ModelError(
            "No such model folder" if not model.is_dir() else "The folder holds no Hugging Face checkpoint",
            where=key,
            got=model.absolute(),
            expected="a folder with config.json, *.safetensors and a tokenizer",
            fix=f"set {key} to the folder of a downloaded or converted checkpoint",
        )
    if not any(model.glob("*.safetensors")):
        raise ModelError("The checkpoint has no weights", where=key, got=model.absolute(), expected="*.safetensors")


def longest_of(config: Config) -> dict[str, int]:
    """Most tokens of prompt and response, by key."""
    return {
        "data.max_prompt_tokens": config.data.max_prompt_tokens,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }


def check_context(key: str, model: Path, longest: dict[str, int]) -> None:
    """Raise ConfigError when the ``longest`` prompt and response do not fit into the context of ``model``."""
    context = text_config(read_hf_config(model)).get("max_position_embeddings")
    total = sum(longest.values())
    if context is not None and total > context:
        raise ConfigError(
            "Prompt and response may be longer than the model's context",
            where=key,
            got=f"{' + '.join(f'{name} {tokens}' for name, tokens in longest.items())} = {total}",
            expected=f"at most {context}",
            fix="lower one of the two",
        )


def _check_top_k(key: str, model: Path, top_k: int) -> None:
    """A server ends at the first request for more tokens than its vocabulary has."""
    vocab_size = text_config(read_hf_config(model)).get("vocab_size")
    if vocab_size is not None and top_k > vocab_size:
        raise ConfigError(
            "More most likely tokens are asked for than the model's vocabulary has",
            where=f"scoring.top_k, {key}",
            got=top_k,
            expected=f"at most {vocab_size}",
            fix="lower scoring.top_k",
        )
