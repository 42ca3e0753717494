"""What every section of a space file shares.

Decides how a section is validated: frozen, strict, without unknown keys, and with the faults between its keys reported
beside the faults of single values. Must not know any particular section.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
FACTORY_PATTERN = r"^[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*$"
Found = tuple[tuple[str | int, ...], str]


def as_tuple(value: Any) -> Any:
    """Returns a list as a tuple and anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


def number(value: Any) -> float | None:
    """Returns `value` where it is a number (not a bool)."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _duration(value: Any) -> Any:
    """Returns seconds for a number, or a number followed by s, m or h."""
    match = re.fullmatch(DURATION_PATTERN, value) if isinstance(value, str) else None
    found = float(match[1]) * _UNITS[match[2]] if match else number(value)
    if found is None or not 0 < found <= _LONGEST:
        text = f"expected a positive number of seconds, or text such as 90s, 10m or 2h; got {value!r}"
        raise PydanticCustomError("fault", "{text}", {"text": text})
    return float(found)


DURATION_PATTERN = r"^([0-9]*\.?[0-9]+)([smh]?)$"
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}
_LONGEST = 1e9
"""Seconds: 30 years."""
Duration = Annotated[
    float,
    BeforeValidator(_duration),
    WithJsonSchema(
        {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": DURATION_PATTERN}]}
    ),
]
"""A time in seconds."""
Glob = Annotated[str, Field(min_length=1)]
Globs = Annotated[tuple[Glob, ...], BeforeValidator(as_tuple)]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple), Field(min_length=1)]


class Section(BaseModel):
    """A mapping of the space file: frozen, strict, without unknown keys; reports the faults between its keys too."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @classmethod
    def cross_faults(cls, raw: Mapping[str, Any]) -> Iterator[Found]:
        """Yields (place, message) for values that are valid alone but not together; `raw` may hold invalid values."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _all_faults(cls, data: Any, handler: Any) -> Any:
        # An after-validator would run only once every single value is valid and so hide its faults behind theirs.
        found = [
            InitErrorDetails(type=PydanticCustomError("fault", "{text}", {"text": text}), loc=place, input=None)
            for place, text in (cls.cross_faults(data) if isinstance(data, Mapping) else ())
        ]
        try:
            value = handler(data)
        except ValidationError as error:
            if not found:
                raise
            known = [
                InitErrorDetails(
                    type=PydanticCustomError("fault", "{text}", e["ctx"]) if e["type"] == "fault" else e["type"],
                    loc=e["loc"],
                    input=e["input"],
                    ctx=e.get("ctx", {}),
                )
                for e in error.errors(include_url=False)
            ]
            raise ValidationError.from_exception_data(cls.__name__, known + found) from error
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return value
