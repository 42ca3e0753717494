"""Space files as text: YAML with the line of every key, environment variables and overrides.

Decides how a file becomes plain values and where each value stands. Must not know what the keys mean: that is
the sections.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autoprune.errors import Fault, SpaceError

Place = tuple[str | int, ...]

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}")
_OPEN = re.compile(r"\$\{[A-Za-z_]")
_MAX_NODES = 20_000  # aliases can make a short file expand without end
_MAX_DEPTH = 40  # the deepest key of a real space has five above it; PyYAML's time grows with the square
_MAX_BYTES = 2**20  # also of a device or a pipe, which have no end
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: `no` and `on` are texts, `1e-3` is a number, `010` is ten."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own shape
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Refuses what is nested too deeply before the rest of it is read."""
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _tag, re.compile(rf"^(?:{_pattern})$"), list(_first))


@dataclass(frozen=True, slots=True)
class Document:
    """A space file as plain values.

    `lines` holds the line of every place in the file, `overridden` the places that `--set` wrote.
    """

    data: dict[str, Any]
    lines: Mapping[Place, int]
    faults: tuple[Fault, ...] = ()
    overridden: frozenset[Place] = frozenset()

    def fault(self, place: Place, message: str) -> Fault:
        """Returns a fault at `place`, with the line of the nearest enclosing key that stands in the file."""
        if any(place[: len(path)] == path for path in self.overridden):
            return Fault(f"{message} (from --set)", dotted(place))
        line = next((self.lines[place[:n]] for n in range(len(place), 0, -1) if place[:n] in self.lines), None)
        return Fault(message, dotted(place), line)


def dotted(place: Place) -> str:
    """Returns a place as text: `search.ladder[1].epochs`."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def read_document(path: Path, env: Mapping[str, str]) -> Document:
    """Reads a space file.

    Raises:
        SpaceError: The file is missing, cannot be read, is not YAML, or is not a mapping.
    """
    try:
        with open(path, "rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise SpaceError([Fault("there is no such file")], str(path)) from error
    except OSError as error:
        raise SpaceError([Fault(f"the file cannot be read: {error.strerror or error}")], str(path)) from error
    if len(raw) > _MAX_BYTES:
        raise SpaceError([Fault("the file is larger than 1 MiB, which no space file is")], str(path))
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        text = "the file is not UTF-8 text; a space file is YAML"
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
            text = "the file is UTF-16 text; save it as UTF-8"
        raise SpaceError([Fault(text, line=line)], str(path)) from error
    return parse_document(text, env, source=str(path))


def parse_document(text: str, env: Mapping[str, str], *, source: str = "") -> Document:
    """Reads the text of a space file; faults of single values (duplicate keys, unset variables) are collected.

    Raises:
        SpaceError: The text is empty, not YAML, or not a mapping.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise SpaceError([_syntax_fault(error, text)], source) from error
    except RecursionError as error:
        raise SpaceError([Fault(f"the file is nested too deeply (more than {_MAX_DEPTH} levels)")], source) from error
    if node is None or (isinstance(node, yaml.ScalarNode) and node.tag == _TAG + "null"):
        raise SpaceError([Fault("the file is empty; `autoprune schema` describes what belongs into it")], source)
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        raise SpaceError(
            [Fault("a space file is a mapping of keys to values, each written `key: value`", line=line)], source
        )
    reader = _Reader(env)
    data = reader.value(node, (), ())
    if reader.count > _MAX_NODES:  # what else would be said is about what was cut off
        raise SpaceError([Fault(f"the file has more than {_MAX_NODES} values, aliases included")], source)
    return Document(data, reader.lines, tuple(reader.faults))


def write_document(data: Mapping[str, Any]) -> str:
    """Returns plain values as the text of a space file, in their order."""
    text: str = yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def override(document: Document, settings: Sequence[str], env: Mapping[str, str]) -> Document:
    """Returns the document with `key.path=value` settings applied; a value is read as YAML.

    A list is addressed by position: `search.ladder.1.epochs=5`.
    """
    faults, overridden = list(document.faults), set(document.overridden)
    data = _copy(document.data)
    for setting in settings:
        path, equals, text = setting.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            faults.append(Fault(f"--set {setting!r}: write key.path=value"))
            continue
        try:
            node = yaml.compose(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError) as error:
            reason = _syntax_fault(error, text).message if isinstance(error, yaml.YAMLError) else "nested too deeply"
            faults.append(Fault(f"--set {setting!r}: {reason}"))
            continue
        reader = _Reader(env)
        value = None if node is None else reader.value(node, (), ())
        faults += [Fault(f"--set {setting!r}: {fault.message}") for fault in reader.faults]
        place = _put(data, keys, value)
        if isinstance(place, str):
            faults.append(Fault(f"--set {setting!r}: {place}"))
        else:
            overridden.add(place)
    # What stood at a place that was set anew no longer has faults of its own.
    places = {dotted(place) for place in overridden}
    faults = [f for f in faults if f.line is None or f.place not in places]
    return Document(data, document.lines, tuple(faults), frozenset(overridden))


def leaves(value: Any, place: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Yields (place, value) of everything in plain values that is no mapping and no list."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from leaves(item, (*place, key))
    elif place:
        yield place, value


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return [_copy(item) for item in value] if isinstance(value, list) else value


def _put(data: Any, keys: Sequence[str], value: Any) -> Place | str:
    """Writes `value` and returns its place, or what is wrong with the path."""
    place: Place = ()
    for i, key in enumerate(keys):
        last = i == len(keys) - 1
        if isinstance(data, list):
            if not key.isdecimal() or int(key) >= len(data):
                return f"{dotted(place)} has {len(data)} items, counted from 0; there is no item {key!r}"
            index = int(key)
            place = (*place, index)
            if not last and not isinstance(data[index], (dict, list)):
                data[index] = {}
            if last:
                data[index] = value
            data = data[index]
            continue
        place = (*place, key)
        if last:
            data[key] = value
        else:
            if not isinstance(data.get(key), (dict, list)):
                data[key] = {}
            data = data[key]
    return place


class _Reader:
    """Turns nodes into plain values, noting lines and faults on the way."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.lines: dict[Place, int] = {}
        self.faults: list[Fault] = []
        self.count = 0

    def value(self, node: yaml.Node, place: Place, above: tuple[yaml.Node, ...]) -> Any:
        self.count += 1
        if any(node is parent for parent in above):
            self._fault(node, place, "an alias refers to what contains it")
            return None
        if self.count > _MAX_NODES:
            if self.count == _MAX_NODES + 1:
                self._fault(node, place, f"more than {_MAX_NODES} values, aliases included")
            return None
        if not isinstance(node, yaml.ScalarNode) and node.tag not in (f"{_TAG}map", f"{_TAG}seq"):
            self._fault(node, place, f"the tag {node.tag.replace(_TAG, '!!')!r} is not supported")
            return None
        if isinstance(node, yaml.MappingNode):
            return {key: self.value(item, (*place, key), (*above, node)) for key, item in self._items(node, place)}
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.lines[(*place, i)] = item.start_mark.line + 1
            return [self.value(item, (*place, i), (*above, node)) for i, item in enumerate(node.value)]
        return self._scalar(node, place)

    def _items(self, node: yaml.MappingNode, place: Place) -> Iterator[tuple[str, yaml.Node]]:
        seen: dict[str, int] = {}
        for key_node, item in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._fault(key_node, place, "a key is a plain text, not a list or a mapping")
                continue
            key = str(key_node.value)
            if key == "<<":
                self._fault(key_node, place, "merge keys (`<<`) are not supported; write the values out")
            elif key in seen:
                message = f"the key occurs twice (first in line {seen[key]})"
                self.faults.append(Fault(message, dotted((*place, key)), line))
            else:
                seen[key] = self.lines[(*place, key)] = line
                yield key, item

    def _scalar(self, node: yaml.Node, place: Place) -> Any:
        text, tag = str(node.value), str(node.tag)
        if "${" in text:
            text = _VARIABLE.sub(lambda match: self._variable(match, node, place), text)
            if _OPEN.search(_VARIABLE.sub("", str(node.value))):
                self._fault(node, place, "a variable is written ${NAME} or ${NAME:-value}, and a brace is missing here")
            if getattr(node, "style", None) is None:  # an unquoted variable may stand for a number
                tag = str(_Loader("").resolve(yaml.ScalarNode, text, (True, False)))  # type: ignore[no-untyped-call]
        if not tag.startswith(_TAG) or tag.removeprefix(_TAG) not in {"str", "bool", "int", "float", "null"}:
            self._fault(node, place, f"the tag {tag.replace(_TAG, '!!')!r} is not supported")
            return None
        kind = tag.removeprefix(_TAG)
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return float(text.replace(".inf", "inf").replace(".nan", "nan") if text[-1:] in "fFnN" else text)
        except ValueError:
            self._fault(node, place, f"cannot read {text[:40]!r} as a number")
            return None
        if kind == "bool":
            return text.lower() == "true"
        return None if kind == "null" else text

    def _variable(self, match: re.Match[str], node: yaml.Node, place: Place) -> str:
        name, default = match[1], match[2]
        value = self.env.get(name, "")
        if value or (default is None and name in self.env):
            return value
        if default is None:
            self._fault(
                node, place, f"the environment variable {name} is not set; a default is written ${{{name}:-value}}"
            )
            return ""
        return default

    def _fault(self, node: yaml.Node, place: Place, message: str) -> None:
        self.faults.append(Fault(message, dotted(place), node.start_mark.line + 1))


def _syntax_fault(error: yaml.YAMLError, text: str) -> Fault:
    """Says in plain words why the text is not YAML."""
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1 if isinstance(error.position, int) else None
        return Fault("the file holds a character that YAML does not allow", line=line)
    if not isinstance(error, yaml.MarkedYAMLError):
        return Fault(f"not YAML: {error}")
    mark = error.problem_mark or error.context_mark
    problem = error.problem or str(error)
    if "'\\t'" in problem:
        problem = "a tab is used for indentation; YAML allows only spaces"
    elif "mapping values are not allowed" in problem:
        problem = "unexpected `:`; is the indentation right, or is a text with a colon unquoted?"
    elif "expected a single document" in (error.context or "") + problem:
        problem = "the file holds more than one document (`---`)"
    elif "'<document start>'" in problem:
        problem = "a space file is one mapping of keys to values, written `key: value`; this line is none of it"
    elif "expected <block end>" in problem:
        problem = "the indentation does not fit the lines above"
    elif error.context:
        begun = error.context_mark
        begins = f" that begins in line {begun.line + 1}" if begun and mark and begun.line != mark.line else ""
        problem = f"{problem} ({error.context}{begins})"
    return Fault(f"not valid YAML: {problem}", line=mark.line + 1 if mark else None)
