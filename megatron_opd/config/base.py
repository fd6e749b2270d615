"""What all sections of the config share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AllowInfNan, BaseModel, ConfigDict, Field, Strict

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Real = Annotated[float, Strict(), AllowInfNan(False)]
"""A finite number, and neither a truth value nor a text that looks like one."""


class Section(BaseModel):
    """A part of the config: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
