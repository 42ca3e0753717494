"""What `import autoprune` offers."""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import ModuleType

import pytest

import autoprune
from autoprune import errors

ERRORS = {
    name
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.AutopruneError) and value.__module__ == errors.__name__
}


def test_the_export_list_is_complete_and_every_error_is_in_it() -> None:
    assert set(autoprune.__all__) == ERRORS | {"__version__", "trace", "prune", "search", "load"}
    assert set(autoprune.__all__) <= set(dir(autoprune))
    for name in ERRORS:
        assert getattr(autoprune, name) is getattr(errors, name)


def test_type_checkers_are_told_the_same_names() -> None:
    tree = ast.parse(Path(autoprune.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    names = {a.asname for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names} | {"__version__"}
    assert names == set(autoprune.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'purne'"):
        autoprune.purne  # noqa: B018 - the access is the test


def test_search_is_loaded_when_it_is_first_used(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.delitem(vars(autoprune), "search", raising=False)
    coordinator = ModuleType("autoprune.coordinator")
    coordinator.search = lambda *args, **kwargs: calls.append((args, kwargs)) or "result"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "autoprune.coordinator", coordinator)
    assert autoprune.search("model", trials=3) == "result"
    assert calls == [(("model",), {"trials": 3})]
    monkeypatch.undo()
    vars(autoprune).pop("search", None)  # the double


def test_search_is_a_plain_function_with_its_own_signature() -> None:
    importlib.import_module("autoprune.studies.study")
    assert inspect.isfunction(autoprune.search)
    assert next(iter(inspect.signature(autoprune.search).parameters)) == "model"
    assert inspect.getdoc(autoprune.search)
