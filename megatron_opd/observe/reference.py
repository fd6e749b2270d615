"""The configuration reference, made from the schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_opd.config import Config, EvaluationConfig


@dataclass(frozen=True, slots=True)
class Key:
    """One key of the config; "teachers.<name>.model" stands for the same key of every teacher."""

    name: str
    type: str
    default: str
    meaning: str


def config_keys(schema: type[BaseModel] = Config) -> Iterator[Key]:
    """Every key in the order of the schema."""
    yield from _keys(schema, "")


def config_reference() -> str:
    """One line for each key: name, type, default, meaning."""
    return "\n".join(f"{key.name}: {key.type} = {key.default}\n    {key.meaning}" for key in config_keys())


def config_tables() -> str:
    """The same as Markdown: a table for each section of the config."""
    sections: dict[str, list[Key]] = {}
    for key in config_keys():
        first, _, rest = key.name.partition(".")
        sections.setdefault(first if rest else "", []).append(key)
    parts = []
    for section, keys in sections.items():
        title = f"## `{section}`" if section else "## The run"
        lines = [title, "", "| key | type | default | meaning |", "|---|---|---|---|"]
        lines += [f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.meaning)} |" for key in keys]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def evaluation_table() -> str:
    """The keys of ``megatron-opd eval`` as one Markdown table; sections that a run has too are not repeated."""
    shared = ("engine.", "server.", "verifiers.", "benchmarks.<name>.columns.")
    keys = [key for key in config_keys(EvaluationConfig) if not key.name.startswith(shared)]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    lines += [f"| `{key.name}` | {_cell(key.type)} | `{key.default}` | {_cell(key.meaning)} |" for key in keys]
    return "\n".join(lines)


def _keys(section: type[BaseModel], prefix: str) -> Iterator[Key]:
    for name, field in section.model_fields.items():
        key, inner = prefix + name, _section_of(field.annotation)
        if inner is None:
            yield Key(key, _type_name(field.annotation), _default(field), field.description)
        else:
            if NoneType in get_args(field.annotation):
                yield Key(key, f"{key}.* | null", _default(field), field.description)
            yield from _keys(inner, f"{key}.<name>." if get_origin(field.annotation) is dict else f"{key}.")


def _cell(text: str) -> str:
    """For a table: no bar that would end the cell, nothing that looks like a tag."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The config section that a field holds, also as the value of a dictionary."""
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _type_name(annotation: Any) -> str:
    """A short name: int, "a" | "b", float | null."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (Union, UnionType):
        return " | ".join(map(_type_name, arguments))
    if origin is dict:
        return "mapping of " + " to ".join(map(_type_name, arguments))
    return "null" if annotation is NoneType else annotation.__name__.lower()


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "(required)"
    return "null" if field.default is None else str(field.default)
