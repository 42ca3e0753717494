"""Nothing in the package reads a file or the network in a way that can run code, checked on the source itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "autoprune"

UNSAFE = {
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "dill.load",
    "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "torch.load", "torch.jit.load",
    "torch.export.load", "torch.hub.load", "torch.hub.load_state_dict_from_url", "torch.package.PackageImporter",
    "np.load", "numpy.load", "np.fromfile", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.load_all",
    "yaml.unsafe_load", "yaml.full_load", "yaml.compose", "eval", "exec", "compile", "__import__",
    "importlib.import_module", "os.system", "shutil.unpack_archive", "mlflow.pyfunc.load_model",
    "mlflow.pytorch.load_model",
}  # fmt: skip
METHODS = {"extractall", "extract"}  # of archives
KEYWORDS = {"shell", "allow_pickle", "trust_remote_code"}

ALLOWED = {
    # between this process and the workers that it started itself, through a pipe
    ("executors/processes.py", "pickle.loads"): "pipes to our own processes",
    ("executors/worker.py", "pickle.loads"): "pipes to our own processes",
    ("studies/ahead.py", "pickle.load"): "pipes to our own process",
    # between this process and the tasks that it started on the cluster which the user named
    ("executors/cluster.py", "pickle.loads"): "Ray carries what our own tasks send",
    # the workbench as it comes through the pipe; the file that workers map holds plain numbers alone
    ("network/sharing.py", "pickle.Unpickler"): "pipes to our own processes",
    # refuses every name but those of numpy arrays; the files' checksums are torchvision's
    ("network/data/cifar.py", "pickle.Unpickler"): "an unpickler that looks up arrays alone",
    ("network/models/checkpoints.py", "torch.load"): "with weights_only=True",
    ("network/artifacts/export.py", "torch.export.load"): "a file that this very call has just written",
    # compose only builds nodes, and the loader is a SafeLoader
    ("space/file.py", "yaml.compose"): "nodes, no objects",
    # names written in the source, and the user's own functions, of which space/code.py says whose may be imported
    ("__init__.py", "importlib.import_module"): "our own modules",
    ("coordinator/__init__.py", "importlib.import_module"): "our own modules",
    ("network/models/torchvision.py", "importlib.import_module"): "torchvision",
    ("network/models/building.py", "importlib.import_module"): "the gate of factories",
}


def uses(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Yields every call and every mention of what can run code, by its dotted name as it stands in the source."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Attribute, ast.Name)):
            text = ast.unparse(node)
            head, dot, rest = text.partition(".")
            full = names.get(head, head) + dot + rest
            if full in UNSAFE:
                yield full, node
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS:
            yield node.func.attr, node
        if isinstance(node, ast.Call):
            for keyword in node.keywords:
                if keyword.arg in KEYWORDS and not (
                    isinstance(keyword.value, ast.Constant) and keyword.value.value is False
                ):
                    yield f"{keyword.arg}=", node


def found_in(source: str) -> list[str]:
    return [name for name, _ in uses(ast.parse(source))]


def test_only_named_places_use_what_could_run_code() -> None:
    found = {
        (str(path.relative_to(PACKAGE)), name)
        for path in PACKAGE.rglob("*.py")
        for name, _ in uses(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(ALLOWED), "a place is new, or a place of the list is gone"


def test_every_torch_load_says_weights_only() -> None:
    calls = [
        node
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    ]
    assert calls
    for call in calls:
        assert "weights_only=True" in [ast.unparse(keyword) for keyword in call.keywords]


def test_every_yaml_loader_is_a_safe_one() -> None:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr.endswith("Loader") and ast.unparse(node.value) == "yaml":
                assert node.attr == "SafeLoader", f"{path}: yaml.{node.attr}"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle\npickle.loads(b'')", "pickle.loads"),
        ("from pickle import loads as read\nread(b'')", "pickle.loads"),
        ("import pickle as p\np.load(f)", "pickle.load"),
        ("import numpy as np\nnp.load('x')", "numpy.load"),
        ("import numpy as np\nnp.savez('x', allow_pickle=True)", "allow_pickle="),
        ("import torch\nread = torch.load", "torch.load"),
        ("import tarfile\ntarfile.open('x').extractall('.')", "extractall"),
        ("import subprocess\nsubprocess.run('x', shell=True)", "shell="),
        ("eval('1')", "eval"),
    ],
)
def test_the_check_finds_what_it_looks_for(source: str, name: str) -> None:
    assert name in found_in(source)


def test_the_check_leaves_safe_code_alone() -> None:
    assert found_in("import json\njson.load(f)\nmodel.eval()\nimport re\nre.search('x', y)") == []
