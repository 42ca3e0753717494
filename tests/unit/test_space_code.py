"""Whose code a space may name: that of the working directory, or any where the caller allowed it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autoprune.errors import InputError, SpaceError
from autoprune.space import Space, json_schema, load_space
from autoprune.space.code import CODE_KEYS, check_code, check_mapping, code_places, refusal
from autoprune.space.section import FACTORY_PATTERN

SPACE = """\
schema: 1
name: own
model: {{factory: "{}"}}
data: {{name: digits}}
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path: Path, text: str = "def build():\n    return 1\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def space_naming(work: Path, function: str, **options: Any) -> Space:
    return load_space(write(work / "space.yaml", SPACE.format(function)), env={}, **options)


@pytest.mark.parametrize(
    "function",
    ["os:system", "subprocess:run", "builtins:exec", "sys:exit", "torch.hub:load", "__main__:run", "yaml:load"],
)
def test_installed_code_is_refused_by_name_with_its_line_and_what_to_do(work: Path, function: str) -> None:
    with pytest.raises(SpaceError) as caught:
        space_naming(work, function)
    (fault,) = caught.value.faults
    assert fault.line == 3
    assert fault.place == "model.factory"
    for words in (repr(function), "not a file of the working directory", str(work), "--allow-code"):
        assert words in fault.message


def test_installed_code_is_named_once_the_caller_allows_it(work: Path) -> None:
    assert space_naming(work, "os:system", allow_code=True).model.factory == "os:system"


@pytest.mark.parametrize("file", ["own_x.py", "own_x/__init__.py", "own_x/nets.py"])
def test_code_of_the_working_directory_is_allowed(work: Path, file: str) -> None:
    write(work / file)
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert space_naming(work, f"{module}:build").model.factory == f"{module}:build"


def test_what_the_own_package_imports_from_itself_is_allowed(work: Path) -> None:
    write(work / "own_y/nets.py")
    write(work / "own_y/__init__.py", "from .nets import build\nfrom own_y.nets import build as other\n")
    assert refusal("own_y:build", directory=work) is None
    assert refusal("own_y:other", directory=work) is None


@pytest.mark.parametrize(
    "text",
    [
        "from subprocess import run\n",
        "from os import system as run\n",
        "from subprocess import *\n",
        "try:\n    from subprocess import run\nexcept ImportError:\n    def run(): ...\n",
        "if True:\n    from subprocess import run\n",
        "from own_tasks_more import run\n",
    ],
)
def test_what_an_own_module_imports_from_elsewhere_is_refused(work: Path, text: str) -> None:
    write(work / "own_tasks_more.py", "from os import system as run\n")
    write(work / "own_tasks.py", text)
    found = refusal("own_tasks:run", directory=work)
    assert found is not None
    assert "own_tasks imports 'run' from" in found


def test_a_name_that_is_defined_beside_a_star_import_is_allowed(work: Path) -> None:
    write(work / "own_star.py", "from os.path import *\ndef run():\n    ...\n")
    assert refusal("own_star:run", directory=work) is None


def test_modules_that_import_each_other_are_followed_once(work: Path) -> None:
    write(work / "own_a.py", "from own_b import build\n")
    write(work / "own_b.py", "from own_a import build\n")
    assert refusal("own_a:build", directory=work) is None


def test_a_link_that_leads_out_of_the_working_directory_is_refused(work: Path) -> None:
    inside = work / "inside"
    inside.mkdir()
    write(work / "outside.py")
    (inside / "own_link.py").symlink_to(work / "outside.py")
    assert "outside.py" in str(refusal("own_link:build", directory=inside))


def test_a_virtual_environment_inside_the_working_directory_is_not_the_working_directory(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = work / ".venv/lib/python3.11/site-packages"
    write(packages / "own_installed.py")
    monkeypatch.syspath_prepend(packages)
    assert "site-packages" in str(refusal("own_installed:build", directory=work))


def test_an_installed_module_is_not_hidden_by_a_file_of_the_same_name(work: Path) -> None:
    write(work / "subprocess.py", "def run(): ...\n")
    assert refusal("subprocess:run", directory=work) is not None


def test_nothing_is_imported_to_find_out(work: Path) -> None:
    write(work / "own_loud/__init__.py", "raise SystemExit('imported')\n")
    write(work / "own_loud/deep.py", "raise SystemExit('imported')\n")
    assert refusal("own_loud.deep:build", directory=work) is None
    assert "own_loud" not in sys.modules


def test_a_module_that_does_not_exist_is_left_to_the_import(work: Path) -> None:
    assert refusal("own_nowhere:build", directory=work) is None
    assert refusal("own_nowhere.deep:build", directory=work) is None


def test_autoprunes_own_functions_are_no_factories(work: Path) -> None:
    assert refusal("autoprune.network.models.checkpoints:write_whole", directory=work) is not None


def test_criteria_and_data_are_code_as_well(work: Path) -> None:
    data = {
        "model": {"name": "mlp", "arguments": {"factory": "os:system"}},
        "data": {"factory": "os:getcwd"},
        "criteria": {"choices": ["l1", "os:system"]},
        "groups": {"include": ["attention:heads"]},
    }
    assert dict(code_places(data)) == {("data", "factory"): "os:getcwd", ("criteria", "choices", 1): "os:system"}
    with pytest.raises(InputError, match=r"stored: data\.factory 'os:getcwd' is not run.*--allow-code"):
        check_mapping(data, allow=False, source="stored")
    check_mapping(data, allow=True, source="stored")


def test_every_key_that_takes_a_function_is_looked_at() -> None:
    schema = json_schema()
    sections = [schema, *schema["$defs"].values()]
    keys = {
        key
        for section in sections
        for key, value in section.get("properties", {}).items()
        if FACTORY_PATTERN in map(str, texts(value))
    }
    assert keys == {"factory", "choices"}
    assert keys - {"choices"} <= set(CODE_KEYS)


def texts(value: Any) -> Iterator[Any]:
    """Yields every leaf of a JSON value."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts(item)
    else:
        yield value


def test_nothing_named_is_nothing_refused() -> None:
    check_code(None, allow=False)


def test_a_saved_model_is_built_by_code_of_the_working_directory_alone(work: Path) -> None:
    from autoprune.network.artifacts.saved import load

    folder = work / "model"
    origin = {"factory": "os:system", "arguments": {"command": "touch ran"}}
    write(folder / "policy.json", json.dumps({"schema": 1, "origin": origin}))
    with pytest.raises(InputError, match=r"policy\.json: origin\.factory 'os:system' is not run.*--allow-code"):
        load(folder)
    assert not (work / "ran").exists()


def test_mlflow_loads_no_model_that_is_built_by_installed_code(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoprune.network.artifacts.serving import _load_pyfunc

    document = {"schema": 1, "input_shape": [1], "origin": {"factory": "os:getcwd", "arguments": {}}}
    write(work / "model/policy.json", json.dumps(document))
    with pytest.raises(InputError, match="is not run"):
        _load_pyfunc(str(work / "model"))
    monkeypatch.setenv("AUTOPRUNE_ALLOW_CODE", "1")
    with pytest.raises(InputError, match="returned str, not a torch"):
        _load_pyfunc(str(work / "model"))
