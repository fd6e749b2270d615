"""From YAML files and ``key=value`` arguments to a checked config, or to a list of every mistake."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TypeVar, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ValidationError
from yaml import YAMLError

from megatron_opd.config.base import Section
from megatron_opd.config.evaluation import EvaluationConfig
from megatron_opd.config.run import Config
from megatron_opd.errors import ConfigError

SectionType = TypeVar("SectionType", bound=Section)


def load_config(path: Path, overrides: list[str]) -> Config:
    """Read ``path``, merge ``overrides`` from left to right (YAML files, or ``a.b=value``) and check everything.

    A file may name files that it builds on, ``defaults: [recipe/uni_opd_text.yaml]``, relative to itself. Raises
    ConfigError that lists every mistake.
    """
    _check_form(overrides, "steps=2")
    merged = _merge(_read(path, ()), overrides)
    return parse_config(_resolve(merged, path), where=str(path))


def load_evaluation(items: list[str]) -> EvaluationConfig:
    """The same for an evaluation, from YAML files and ``key=value`` arguments in any order."""
    _check_form(items, "limit=10")
    files = " ".join(item for item in items if "=" not in item)
    if not files:
        raise ConfigError("No config is given", expected="at least one .yaml file, for example conf/eval/math.yaml")
    merged = _merge(OmegaConf.create(), items)
    return _validate(EvaluationConfig, _resolve(merged, files), files, fix="docs/evaluation.md lists every key")


def _check_form(overrides: list[str], example: str) -> None:
    malformed = [item for item in overrides if ("=" not in item and not item.endswith(".yaml")) or item.startswith("=")]
    if malformed:
        raise ConfigError(
            "Malformed override", got=" ".join(malformed), expected=f"key=value, for example {example}, or a .yaml file"
        )


def load_options(schema: type[SectionType], options: list[str], where: str) -> SectionType:
    """A section from ``key=value`` arguments alone. Raises ConfigError that lists every mistake."""
    malformed = [item for item in options if "=" not in item or item.startswith("=")]
    if malformed:
        raise ConfigError("Malformed option", where=where, got=" ".join(malformed), expected="key=value")
    plain = _resolve(_merge(OmegaConf.create(), options), where)
    keys = ", ".join(schema.model_fields)
    return _validate(schema, plain, where, fix=f"the keys are {keys}")


def _merge(merged: DictConfig, overrides: list[str]) -> DictConfig:
    for item in overrides:
        is_file = "=" not in item
        try:
            merged = OmegaConf.merge(merged, _read(Path(item), ()) if is_file else OmegaConf.from_dotlist([item]))
        except ConfigError:  # of the file itself
            raise
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise ConfigError("The config cannot be merged", where=item, got=error) from error
    return merged


def _resolve(merged: DictConfig, where: object) -> object:
    try:
        return OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError("The config cannot be resolved", where=where, got=error) from error


def _read(path: Path, inside: tuple[Path, ...]) -> DictConfig:
    """The file merged over what it builds on; ``inside``: the files that led here."""
    if not path.is_file():
        raise ConfigError("No such config file", where=path.absolute(), fix="give the path of a YAML file")
    here = path.resolve()
    if here in inside:
        raise ConfigError("A config file builds on itself", where=path, got=" -> ".join(map(str, [*inside, here])))
    try:
        own = OmegaConf.load(path)
        if not isinstance(own, DictConfig):
            raise ConfigError("The config is not a mapping", where=path, got=type(own).__name__)
        named = own.pop("defaults", [])
        bases = [_read(path.parent / name, (*inside, here)) for name in named]
        return OmegaConf.merge(*bases, own)
    except ConfigError:  # of this file or of one that it builds on: it says more than what follows
        raise
    except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
        raise ConfigError("The config cannot be read", where=path, got=error) from error


def parse_config(plain: object, where: str) -> Config:
    """Check a plain mapping against the schema. Raises ConfigError that lists every mistake."""
    return _validate(Config, plain, where, fix="`megatron-opd config` prints every key with its default")


def _validate(schema: type[SectionType], plain: object, where: str, fix: str) -> SectionType:
    if not isinstance(plain, dict):
        raise ConfigError("The config is not a mapping", where=where, got=type(plain).__name__)
    try:
        return schema.model_validate(plain)
    except ValidationError as error:
        mistakes = [_describe(schema, mistake) for mistake in error.errors()]
        raise ConfigError(
            f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''} in the config",
            where=where,
            got="".join(f"\n    {mistake}" for mistake in mistakes),
            fix=fix,
        ) from error


def _describe(schema: type[BaseModel], mistake: dict) -> str:
    location = [str(part) for part in mistake["loc"]]
    key = ".".join(location)
    if mistake["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], _siblings(schema, location[:-1]), n=1)
        return f"{key}: unknown key" + (f"; did you mean {near[0]}?" if near else "")
    if mistake["type"] == "missing":
        return f"{key}: required, but not given"
    if mistake["type"] == "value_error":
        return f"{key + ': ' if key else ''}{mistake['ctx']['error']}"
    return f"{key}: got {mistake['input']!r}; {mistake['msg']}"


def _siblings(section: type[BaseModel], location: list[str]) -> list[str]:
    """Known keys of ``section`` beside the last part of ``location``."""
    for part in location:
        field = section.model_fields.get(part)
        if field is None:  # a key of a dictionary, such as teachers.math: the section is its value's already
            continue
        kinds = (field.annotation, *get_args(field.annotation))
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)
