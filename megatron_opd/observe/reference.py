"""The configuration reference, made from the schema."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from megatron_opd.config import Config


def config_reference() -> str:
    """One line for each key: name, type, default, meaning."""
    return "\n".join(_rows(Config, ""))


def _rows(section: type[BaseModel], prefix: str) -> list[str]:
    rows = []
    for name, field in section.model_fields.items():
        key, inner = prefix + name, _section_of(field.annotation)
        if inner is None:
            rows.append(f"{key}: {_type_name(field.annotation)} = {_default(field)}\n    {field.description}")
        else:
            if NoneType in get_args(field.annotation):
                rows.append(f"{key}: {key}.* | null = {_default(field)}\n    {field.description}")
            rows += _rows(inner, f"{key}.<name>." if get_origin(field.annotation) is dict else f"{key}.")
    return rows


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
