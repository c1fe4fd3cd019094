"""Kinds of values that an experiment file may hold."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict


def number(value: Any) -> Any:
    """The value, refused if it is a truth value."""
    # YAML 1.1 reads 1e-3 as text and pydantic reads true as 1: allow the first, refuse the second.
    if isinstance(value, bool):
        raise ValueError("must be a number, not true or false")
    return value


Integer = Annotated[int, Strict()]
Count = Annotated[int, Strict(), Field(ge=1)]
Real = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False)]
Positive = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False, gt=0)]
NotNegative = Annotated[float, BeforeValidator(number), Field(allow_inf_nan=False, ge=0)]
Rate = Annotated[float, BeforeValidator(number), Field(ge=0, lt=1)]
Flag = Annotated[bool, Strict()]


class Section(BaseModel):
    """A mapping of known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)
