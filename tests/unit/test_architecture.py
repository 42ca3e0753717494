"""The direction of imports and the layout of the repository, checked on the source itself."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "autoprune"
CORE = {"errors", "policy", "space", "budget", "cost", "prices", "results", "pareto", "redaction", "memory", "files"}
CORE |= {"objective"}
OUTER = {"network", "studies", "tracking", "report", "executors"}
TOP = {"coordinator", "cli", "__main__", "__init__"}

# Who may import a third-party package, at module level or inside a function.
OWNERS: dict[str, set[str]] = {
    "torch": {"network"},
    "torchvision": {"network"},
    "safetensors": {"network"},
    "sklearn": {"network"},
    "threadpoolctl": {"network"},
    "scipy": {"network", "studies"},
    "PIL": {"network"},
    "onnx": {"network"},
    "onnxruntime": {"network"},
    "onnxscript": {"network"},
    "numpy": OUTER,
    "optuna": {"studies"},
    "mlflow": {"tracking"},
    "psutil": {"tracking"},
    "sqlalchemy": {"studies", "tracking"},  # both Optuna's and MLflow's errors come from it
    "alembic": {"tracking"},  # MLflow's, for its errors
    "requests": {"tracking"},  # likewise
    "pandas": {"report"},
    "plotly": {"report"},
    "matplotlib": {"report"},
    "rich": {"report"},
    "ray": {"executors"},
    "pydantic": {"space"},
    "pydantic_core": {"space"},
    "yaml": {"space"},
    "typer": {"cli"},
}


# The folders of a part in the order of their imports, lowest first; files beside them come last.
FOLDERS = {
    "network": [
        "graph",
        "graph/rules",
        "models",
        "surgery",
        "data",
        "tracing",
        "calibration",
        "devices",
        "repair",
        "latency",
        "artifacts",
        "criteria",
        "training",
        ".",
    ],
    "coordinator": ["stored", "recording", "running", "commands", "service", "."],
}

MOST_MODULES = 25


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """The part of the design that a file belongs to: `network` for autoprune/network/tracing/trace.py."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, *, module_level: bool = False, typed: bool = False) -> Iterator[tuple[str, int]]:
    """Yields every imported dotted name with its line; imports for type checkers alone only where `typed`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if not typed and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        if module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                base = f"{above}.{base}".rstrip(".")
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func) in {"importlib.import_module", "import_module", "__import__"}
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value), node.lineno
        stack += ast.iter_child_nodes(node)


def test_every_module_belongs_to_a_part_of_the_design() -> None:
    parts = {part_of(path) for path in modules()}
    assert parts <= CORE | OUTER | TOP, f"unknown parts: {parts - CORE - OUTER - TOP}"
    assert parts >= CORE


def test_third_party_packages_are_imported_by_their_owners_alone() -> None:
    wrong = []
    for path in modules():
        for name, line in imports(path):
            top = name.split(".")[0]
            if top == "autoprune" or top in sys.stdlib_module_names:
                continue
            if top not in OWNERS:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top} has no owner; add it to OWNERS with its part")
            elif part_of(path) not in OWNERS[top]:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {top} belongs to {', '.join(sorted(OWNERS[top]))}")
    assert not wrong, "\n".join(wrong)


def test_imports_point_inwards() -> None:
    wrong = []
    for path in modules():
        part = part_of(path)
        if part in {"coordinator", "__init__"}:
            allowed = CORE | OUTER | {"coordinator"}
        elif part in {"cli", "__main__"}:
            allowed = CORE | {"coordinator", "cli"}
        else:
            allowed = CORE | ({part} if part in OUTER else set())
        for name, line in imports(path):
            pieces = name.split(".")
            if pieces[0] == "autoprune" and len(pieces) > 1 and pieces[1] not in allowed and pieces[1] != "__version__":
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {part} imports autoprune.{pieces[1]}")
    assert not wrong, "\n".join(wrong)


def files_imported(path: Path) -> Iterator[tuple[Path, int]]:
    """Yields the files of the package that a file imports, for type checkers too, with the line."""
    for name, line in imports(path, typed=True):
        pieces = name.split(".")
        for length in range(len(pieces), 0, -1):
            found = ROOT.joinpath(*pieces[:length])
            file = found / "__init__.py" if found.is_dir() else found.with_suffix(".py")
            if pieces[0] == "autoprune" and file.is_file():
                if file != path:
                    yield file, line
                break


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {path: {file for file, _ in files_imported(path)} for path in modules()}
    while free := {path for path, needed in left.items() if not needed & left.keys()}:
        left = {path: needed for path, needed in left.items() if path not in free}
    while free := {path for path in left if not any(path in needed for needed in left.values())}:
        left = {path: needed for path, needed in left.items() if path not in free}
    assert not left, f"in circles: {', '.join(sorted(str(path.relative_to(ROOT)) for path in left))}"


@pytest.mark.parametrize("part", FOLDERS)
def test_folders_import_only_folders_below_them(part: str) -> None:
    def floor(path: Path) -> int:
        return FOLDERS[part].index(str(path.parent.relative_to(PACKAGE / part)))

    inside = [path for path in modules() if part_of(path) == part]
    known = {str(path.parent.relative_to(PACKAGE / part)) for path in inside}
    assert known <= set(FOLDERS[part]), f"no place in FOLDERS: {known - set(FOLDERS[part])}"
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: imports {file.relative_to(ROOT)}, which lies above"
        for path in inside
        for file, line in files_imported(path)
        if part_of(file) == part and floor(file) > floor(path)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_folder_holds_more_than_25_modules() -> None:
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in modules())
    full = {folder: count for folder, count in counts.items() if count > MOST_MODULES}
    assert not full, f"more than {MOST_MODULES} modules: {full}"


@pytest.mark.parametrize("path", [*sorted((PACKAGE / "cli").glob("*.py")), *sorted(PACKAGE.glob("__*__.py"))], ids=str)
def test_the_command_line_imports_nothing_heavy_at_module_level(path: Path) -> None:
    for imported, line in imports(path, module_level=True):
        top = imported.split(".")[0]
        light = (
            top in sys.stdlib_module_names
            or top == "typer"
            or imported.startswith(("autoprune.errors", "autoprune.redaction", "autoprune.memory", "autoprune.cli"))
        )
        assert light, f"{path}:{line}: {imported} is imported at module level"


def test_every_module_says_what_it_decides() -> None:
    missing = [
        str(path.relative_to(ROOT))
        for path in modules()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not missing


@pytest.mark.parametrize("folder", ["mlflow", "search_spaces"])
def test_configuration_folders_hold_no_python_file(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert list((ROOT / folder).rglob("*.py")) == []


def test_test_folders_hold_no_init_file_and_no_two_tests_of_one_name() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


def test_the_import_rules_would_notice_an_import_inside_a_function(tmp_path: Path) -> None:
    source = tmp_path / "autoprune" / "cost.py"
    source.parent.mkdir()
    source.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pandas\ndef f():\n    import torch.nn\n"
    )
    spec = importlib.util.spec_from_file_location("copy_of_architecture", __file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.ROOT, copy.PACKAGE = tmp_path, tmp_path / "autoprune"
    with pytest.raises(AssertionError, match=r"autoprune.cost\.py:5: torch belongs to network"):
        copy.test_third_party_packages_are_imported_by_their_owners_alone()


def copy_of_this(root: Path) -> ModuleType:
    """Returns this module as it would check another repository."""
    spec = importlib.util.spec_from_file_location("copy_of_architecture", __file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    copy.ROOT, copy.PACKAGE = root, root / "autoprune"
    return copy


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / "autoprune" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_a_circle_of_files_would_be_noticed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.py": "from autoprune.b import f",
            "b.py": "def f():\n    import autoprune.c",
            "c.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from autoprune.a import g",
            "above.py": "import autoprune.a",
            "below.py": "",
        },
    )
    with pytest.raises(AssertionError, match=r"in circles: autoprune/a\.py, autoprune/b\.py, autoprune/c\.py$"):
        copy_of_this(tmp_path).test_no_files_import_each_other_in_a_circle()


def test_an_import_against_the_order_of_folders_would_be_noticed(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "network/graph/labels.py": "def f():\n    from autoprune.network.surgery.cut import cut",
            "network/surgery/cut.py": "",
        },
    )
    with pytest.raises(AssertionError, match=r"graph/labels\.py:2: imports autoprune/network/surgery/cut\.py"):
        copy_of_this(tmp_path).test_folders_import_only_folders_below_them("network")


def test_a_folder_without_a_place_in_the_order_would_be_noticed(tmp_path: Path) -> None:
    write(tmp_path, {"network/elsewhere/new.py": ""})
    with pytest.raises(AssertionError, match=r"no place in FOLDERS: .'elsewhere'"):
        copy_of_this(tmp_path).test_folders_import_only_folders_below_them("network")


def test_a_26th_module_would_be_noticed(tmp_path: Path) -> None:
    write(tmp_path, {f"cli/m{number}.py": "" for number in range(25)})
    copy_of_this(tmp_path).test_no_folder_holds_more_than_25_modules()
    write(tmp_path, {"cli/one_more.py": ""})
    with pytest.raises(AssertionError, match=r"autoprune/cli.*26"):
        copy_of_this(tmp_path).test_no_folder_holds_more_than_25_modules()


def test_importing_autoprune_loads_nothing_heavy() -> None:
    code = (
        "import sys, autoprune, autoprune.cli; autoprune.SpaceError, autoprune.__version__, autoprune.__all__;"
        "heavy = {'torch', 'torchvision', 'optuna', 'mlflow', 'pandas', 'numpy', 'pydantic', 'yaml', 'rich', 'plotly'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
