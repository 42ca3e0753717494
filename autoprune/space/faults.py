"""What is wrong with a space, in plain words.

Decides how pydantic's findings are said to a user: the place, what was expected, and the nearest valid name. Must not
decide what is valid.
"""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from autoprune.errors import Fault, nearest
from autoprune.space.file import Document, Place

_KINDS = {
    bool: "true or false",
    str: "a text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "a mapping of keys to values",
    type(None): "nothing (null)",
}
_EXPECTED = {
    "string_type": "expected a text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "bool_type": "expected true or false",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping of keys to values",
    "model_type": "expected a mapping of keys to values",
    "model_attributes_type": "expected a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": ("gt", "must be above"),
    "greater_than_equal": ("ge", "must be at least"),
    "less_than": ("lt", "must be below"),
    "less_than_equal": ("le", "must be at most"),
}


def plain_faults(error: ValidationError, document: Document, root: type[BaseModel]) -> Iterator[Fault]:
    """Yields one fault for each finding of pydantic, with its line in the document."""
    seen: set[tuple[Place, str]] = set()
    findings = error.errors(include_url=False)
    inside = {found["loc"][:n] for found in findings for n in range(len(found["loc"]))}
    for found in findings:
        place: Place = tuple(found["loc"])
        if found["type"] == "too_short" and place in inside:
            continue  # pydantic counts valid items only: the list is short because of what is reported inside it
        message = _message(found, place, root)
        if (place, message) not in seen:
            seen.add((place, message))
            yield document.fault(place, message)


def _message(found: Mapping[str, Any], place: Place, root: type[BaseModel]) -> str:
    kind, value, context = found["type"], found.get("input"), found.get("ctx", {})
    if kind == "extra_forbidden":
        names = [info.alias or name for name, info in _section(root, place[:-1]).model_fields.items()]
        return f"unknown key{nearest(str(place[-1]), names)}"
    if kind == "missing" and isinstance(place[-1], int):
        return "a value is missing here"
    if kind == "missing":
        hint = "; write `schema: 1`" if place == ("schema",) else ""
        return f"this key is needed{hint}"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        if not isinstance(value, str):
            return f"expected one of {', '.join(names)}; got {shown(value)}"
        return f"unknown value {_short(value)!r}{nearest(value, names)}"
    if kind == "finite_number":
        return f"must be a finite number, got {value}"
    if kind in _BOUNDS:
        key, text = _BOUNDS[kind]
        return f"{text} {_tidy(context[key])}, got {_short(str(value))}"
    if kind in ("too_short", "string_too_short"):
        count = context.get("min_length", 1)
        return "must not be empty" if count == 1 else f"needs {count} values, got {_length(value)}"
    if kind in ("too_long", "string_too_long"):
        what = "characters" if isinstance(value, str) else "values"
        return f"has {_length(value)} {what}; at most {context.get('max_length')} are allowed"
    if kind == "string_pattern_mismatch":
        return f"{_short(value)!r} is not of the right form: {_form(str(place[-1]))}"
    if kind in _EXPECTED:
        return f"{_EXPECTED[kind]}, got {shown(value)}"
    if kind == "fault":
        return str(context["text"])
    return str(found["msg"])


def _form(key: str) -> str:
    return {
        "factory": "write package.module:function",
        "device": "auto, cpu, cuda or cuda:0",
    }.get(key, "lower-case letters, digits, dots, dashes and underscores, starting with a letter or digit")


def shown(value: Any) -> str:
    """Returns a value as a message says it: as YAML writes it, and no longer than a line."""
    if value is None or isinstance(value, (dict, list, tuple)):
        return _KINDS[type(value)]
    if isinstance(value, str):
        return f"the text {_short(value)!r}"
    return str(value).lower() if isinstance(value, bool) else _short(str(value))


def _short(text: Any) -> Any:
    return f"{text[:60]}..." if isinstance(text, str) and len(text) > 60 else text


def _tidy(bound: Any) -> Any:
    return int(bound) if isinstance(bound, float) and bound.is_integer() else bound


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple, dict)) else 0


def _section(root: type[BaseModel], place: Place) -> type[BaseModel]:
    """Returns the model that describes the mapping at `place`."""
    model = root
    for part in place:
        if isinstance(part, int):
            continue
        found = next((info for name, info in model.model_fields.items() if part in (name, info.alias)), None)
        model = next(_models(found.annotation), model) if found else model
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models(part)
