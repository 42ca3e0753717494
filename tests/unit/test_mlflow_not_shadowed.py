"""The repository's folder `mlflow/` must never stand in for the package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def test_mlflow_is_the_installed_package_and_not_our_folder() -> None:
    spec = importlib.util.find_spec("mlflow")
    assert spec is not None
    assert spec.origin is not None, "an empty namespace package: mlflow is not installed"
    origin = Path(spec.origin).resolve()
    assert (REPOSITORY / "mlflow") not in origin.parents


def test_our_folder_holds_no_python_file() -> None:
    assert list((REPOSITORY / "mlflow").rglob("*.py")) == []
