"""A real network on real images, without any fine-tuning: the front must be where it was measured to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("AUTOPRUNE_DATA", ROOT.parent / "shared" / "data"))
FLOORS = {0.70: 0.86, 0.50: 0.81, 0.35: 0.71}
"""Fraction of the MACs → least test accuracy, on the half of the test files that the search does not see."""


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif(
    not (DATA / "resnet20_cifar10jpeg.safetensors").is_file(), reason=f"the JPEG copy of CIFAR-10 is not in {DATA}"
)
def test_resnet20_keeps_its_accuracy_without_fine_tuning_and_no_trial_exceeds_the_budget(tmp_path: Path) -> None:
    space = ROOT / "tests" / "benchmarks" / "resnet20_no_finetuning.yaml"
    env = {
        **os.environ,
        "AUTOPRUNE_DATA": str(DATA),
        "OMP_WAIT_POLICY": "PASSIVE",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}",
    }
    command = [sys.executable, "-m", "autoprune"]
    search = [*command, "search", str(space), "--workers", "2", "--trials", "60", "--set", "search.controls=0"]
    done = subprocess.run(search, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    shown = subprocess.run(
        [*command, "front", "resnet20-no-finetuning", "--json"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    front = json.loads(shown.stdout)
    assert front["dense"]["test_accuracy"] > 0.87
    assert all(point["macs"] <= front["limits"]["macs"] for point in front["front"])
    for fraction, floor in FLOORS.items():
        within = [point for point in front["front"] if point["macs_fraction"] <= fraction]
        picked = max(within, key=lambda point: point["val_accuracy"])  # chosen without the test half
        assert picked["test_accuracy"] >= floor, (fraction, picked["test_accuracy"])
