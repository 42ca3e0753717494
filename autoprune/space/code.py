"""Whose code a space may run.

Decides whether a function that a document names as `package.module:function` may be imported and called: where the
caller allowed code, and else where the function is defined in a file of the working directory, which is what running
`python` there would trust too. Code that is installed is not enough: `os:system` is, and a space file brings the
arguments. Nothing that is judged here is imported. Must not know what the function is for.
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from autoprune.errors import InputError
from autoprune.space.file import Place, leaves
from autoprune.space.section import FACTORY_PATTERN

CODE_KEYS = ("factory", "loss", "metric")
"""Keys whose value names a function of the user's own, in any section."""
ALLOW = "pass --allow-code (in Python: allow_code=True) if you trust it"
_PACKAGE = Path(__file__).resolve().parents[1]


def code_places(data: Mapping[str, Any]) -> Iterator[tuple[Place, str]]:
    """Yields (place, `package.module:function`) of every function that a space document names."""
    for place, value in leaves(data):
        names = place[-1] in CODE_KEYS or place[:2] == ("criteria", "choices")
        if names and "arguments" not in place and isinstance(value, str) and re.fullmatch(FACTORY_PATTERN, value):
            yield place, value


def refusal(path: str, *, directory: Path) -> str | None:
    """Returns why `package.module:function` may not be run unasked, or None where it may.

    It may where the file that defines the function lies below `directory` and is not installed there (a virtual
    environment's packages are). A module that does not exist is not refused: importing it fails with a message of its
    own.
    """
    module, _, function = path.partition(":")
    reason = _Finder(directory.resolve()).refusal(module, function)
    return None if reason is None else f"{path!r} is not run: {reason}; {ALLOW}"


def check_code(path: str | None, *, allow: bool, directory: Path | None = None, what: str = "factory") -> None:
    """Refuses a function that may not be run; see `refusal`.

    Args:
        path: `package.module:function`; None names nothing and passes.
        allow: Whether the caller allowed code.
        directory: The working directory; by default the process's own.
        what: What the function is, for the message.

    Raises:
        InputError: The function may not be run.
    """
    if path is None or allow:
        return
    reason = refusal(path, directory=directory or Path.cwd())
    if reason is not None:
        raise InputError(f"{what} {reason}")


def check_mapping(data: Mapping[str, Any], *, allow: bool, source: str) -> None:
    """Refuses a stored document, such as the settings of an earlier search, that names functions which may not be run.

    Raises:
        InputError: A function may not be run.
    """
    for place, path in code_places(data):
        check_code(path, allow=allow, what=f"{source}: {'.'.join(map(str, place))}")


@dataclass
class _Finder:
    """Follows a name to the file that defines it."""

    directory: Path
    seen: set[tuple[str, str]] = field(default_factory=set)

    def refusal(self, module: str, name: str) -> str | None:
        if (module, name) in self.seen:
            return None
        self.seen.add((module, name))
        file = self._file(module)
        if file is None:
            return None
        if not _below(file, self.directory) or _installed(file):
            kind = "built into Python" if str(file).startswith("<") else str(file)
            return f"{module} is {kind}, not a file of the working directory {self.directory}"
        if file.suffix != ".py":
            return f"{file} is no source file, so it cannot be told what {name!r} is"
        return self._bindings(module, name, file)

    def _bindings(self, module: str, name: str, file: Path) -> str | None:
        """Looks at what `name` is bound to: a definition is fine, an import is followed."""
        try:
            tree = ast.parse(file.read_bytes(), str(file))
        except (OSError, SyntaxError, ValueError):
            return None  # importing it fails with a message of its own
        package = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in _statements(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            parts = package.split(".") if package else []
            base = ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])
            origin = base if node.level else str(node.module)
            for alias in node.names:
                if alias.name == "*" and not self._defined(tree, name):
                    reason = self.refusal(origin, name)
                elif (alias.asname or alias.name) == name:
                    reason = self.refusal(origin, alias.name)
                else:
                    continue
                if reason is not None:
                    return f"{module} imports {name!r} from {origin}: {reason}"
        return None

    @staticmethod
    def _defined(tree: ast.Module, name: str) -> bool:
        kinds = (ast.FunctionDef, ast.ClassDef)
        return any(isinstance(node, kinds) and node.name == name for node in _statements(tree))

    def _file(self, module: str) -> Path | None:
        """Returns the file that importing `module` would run, found as the import system finds it."""
        top, *rest = module.split(".")
        try:
            spec = importlib.util.find_spec(top)
        except (ValueError, ImportError):  # `__main__`, or a module without a spec
            return Path(f"<{top}>")
        spec = spec or PathFinder.find_spec(top, [str(self.directory)])
        for depth in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = ".".join([top, *rest[: depth + 1]])
            spec = PathFinder.find_spec(name, list(spec.submodule_search_locations))
        return None if spec is None else _origin(spec)


def _origin(spec: ModuleSpec) -> Path | None:
    if spec.has_location and spec.origin is not None:
        return Path(spec.origin).resolve()
    return (
        None if spec.origin is None else Path(f"<{spec.origin}>")
    )  # None: a folder without code; `built-in`, `frozen`


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """Yields the statements that bind names of the module: also those inside `if` and `try`, not inside functions."""
    stack: list[ast.AST] = list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt):
            yield node
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.expr):
            stack += ast.iter_child_nodes(node)


def _below(file: Path, folder: Path) -> bool:
    return file.is_relative_to(folder)


def _installed(file: Path) -> bool:
    """Whether a file belongs to Python, to an installed package or to autoprune itself."""
    keys = ("stdlib", "platstdlib", "purelib", "platlib")
    homes = {Path(path).resolve() for key, path in sysconfig.get_paths().items() if key in keys} | {_PACKAGE}
    return any(_below(file, home) for home in homes) or bool({"site-packages", "dist-packages"} & set(file.parts))
