"""Everything that can be known to be wrong before a process is started, told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_opd.config import Config, ServerConfig
from megatron_opd.data.inputs import check_inputs
from megatron_opd.data.tokenizer import load_tokenizer, same_template, same_tokenizer
from megatron_opd.engines.command import check_engine_python, resolve_device
from megatron_opd.engines.vllm_command import check_vllm_python
from megatron_opd.errors import ConfigError, ModelError, OpdError, raise_together
from megatron_opd.observe.sinks import check_sinks
from megatron_opd.runtime.env import secret
from megatron_opd.student.sizes import read_hf_config, size_mistakes


def preflight(config: Config) -> None:
    """Check models, tokenizers, sizes and data. Raises OpdError: the one mistake, or a list of all."""
    raise_together(list(_mistakes(config)))


def _mistakes(config: Config) -> Iterator[OpdError]:
    yield from attempt(lambda: check_sinks(config.sinks))
    frozen = {f"teachers.{domain}": teacher for domain, teacher in config.teachers.items()}
    frozen |= {"reference": config.reference} if config.reference else {}
    servers = {"rollout.server": config.rollout.server} | config.frozen_servers
    yield from _server_mistakes(config, servers)
    models = {"student.model": config.student.model}
    models |= {f"{key}.model": teacher.model for key, teacher in frozen.items()}
    missing = [error for key, model in models.items() for error in attempt(lambda k=key, m=model: check_model(k, m))]
    yield from missing
    if missing:
        return  # what follows reads the models
    yield from size_mistakes(config, read_hf_config(config.student.model))
    for key, model in models.items():
        yield from attempt(lambda k=key, m=model: check_context(k, m, config))
        yield from attempt(lambda k=key, m=model: _check_top_k(k, m, config.scoring.top_k))
    for key, teacher in frozen.items():
        yield from attempt(lambda t=teacher: same_tokenizer(config.student.model, t.model))
        if not teacher.other_template:
            yield from attempt(lambda k=key, t=teacher: same_template(config.student.model, t.model, k))
    yield from attempt(lambda: check_inputs(config, load_tokenizer(config.student.model)))


def _server_mistakes(config: Config, servers: dict[str, ServerConfig]) -> Iterator[OpdError]:
    """Environments that are lacking: of engines to start, and of keys of engines to attach to."""
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


def check_context(key: str, model: Path, config: Config) -> None:
    """Raise ConfigError when the longest prompt and response do not fit into the context of ``model``."""
    context = read_hf_config(model).get("max_position_embeddings")
    longest = config.data.max_prompt_tokens + config.rollout.max_new_tokens
    if context is not None and longest > context:
        raise ConfigError(
            "Prompt and response may be longer than the model's context",
            where=key,
            got=f"data.max_prompt_tokens {config.data.max_prompt_tokens} + "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens} = {longest}",
            expected=f"at most {context}",
            fix="lower one of the two",
        )


def _check_top_k(key: str, model: Path, top_k: int) -> None:
    """A server ends at the first request for more tokens than its vocabulary has."""
    vocab_size = read_hf_config(model).get("vocab_size")
    if vocab_size is not None and top_k > vocab_size:
        raise ConfigError(
            "More most likely tokens are asked for than the model's vocabulary has",
            where=f"scoring.top_k, {key}",
            got=top_k,
            expected=f"at most {vocab_size}",
            fix="lower scoring.top_k",
        )
