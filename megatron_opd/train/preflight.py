"""Everything that can be known to be wrong before a process is started, told at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_opd.config import Config
from megatron_opd.data.inputs import read_inputs
from megatron_opd.data.tokenizer import load_tokenizer, same_tokenizer
from megatron_opd.engines.command import check_engine_python
from megatron_opd.errors import ConfigError, ModelError, OpdError
from megatron_opd.student.sizes import check_sizes, read_hf_config


def preflight(config: Config) -> None:
    """Check models, tokenizers, sizes and data. Raises OpdError: the one mistake, or a list of all."""
    found = list(_mistakes(config))
    if len(found) == 1:
        raise found[0]
    if found:
        listing = "\n".join(f"{number}. {error}" for number, error in enumerate(found, 1))
        raise ConfigError(f"{len(found)} things must be put right before the run can start\n{listing}")


def _mistakes(config: Config) -> Iterator[OpdError]:
    servers = [config.rollout.server, *(teacher.server for teacher in config.teachers.values())]
    if any(server.url is None for server in servers):
        yield from _attempt(lambda: check_engine_python(config.engine))
    models = {"student.model": config.student.model}
    models |= {f"teachers.{domain}.model": teacher.model for domain, teacher in config.teachers.items()}
    missing = [error for key, model in models.items() for error in _attempt(lambda k=key, m=model: _check_model(k, m))]
    yield from missing
    if missing:
        return  # what follows reads the models
    yield from _attempt(lambda: check_sizes(config, read_hf_config(config.student.model)))
    for key, model in models.items():
        yield from _attempt(lambda k=key, m=model: _check_context(k, m, config))
    for teacher in config.teachers.values():
        yield from _attempt(lambda m=teacher.model: same_tokenizer(config.student.model, m))
    yield from _attempt(lambda: read_inputs(config, load_tokenizer(config.student.model)))


def _attempt(check: Callable[[], object]) -> list[OpdError]:
    try:
        check()
    except OpdError as error:
        return [error]
    return []


def _check_model(key: str, model: Path) -> None:
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


def _check_context(key: str, model: Path, config: Config) -> None:
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
