"""A user's model that hangs, dies, raises or returns NaN for some policies costs those trials and never the search."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

# A model whose forward does what MISBEHAVE says as soon as both of its layers are narrower than they were, but for
# batches of two, on which it is tried when it is traced: a layer that fails there is frozen.
MODEL = """\
import os, signal, time
from torch import nn

class Fickle(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 24), nn.Linear(24, 16), nn.Linear(16, num_classes)

    def forward(self, x):
        x = self.last(self.second(self.first(x).relu()).relu())
        widths = self.first.weight.shape[0], self.second.weight.shape[0]
        pruned = widths[0] < 24 and widths[1] < 16
        return misbehave(widths, x) if pruned and len(x) > 2 else x

def misbehave(widths, x):
    kinds = os.environ["MISBEHAVE"].split()
    kind = kinds[widths[0] % len(kinds)]
    if kind == "hang":
        time.sleep(1000)
    if kind == "die":
        os._exit(7)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "raise":
        raise RuntimeError("no kernel for these widths")
    if kind == "nan":
        return x * float("nan")
    return x

def build(num_classes=3):
    return Fickle(num_classes)
"""
REASONS = {
    "hang": "the evaluation made no progress for 15 s, 2 times",
    "die": "the evaluating process died 2 times: exit status 7",
    "crash": "process died 2 times: killed by SIGSEGV, a fault in native code: memory that is not its own",
    "raise": "the evaluation raised RuntimeError: no kernel for these widths (",
    "nan": "loss is nan",
}


@pytest.fixture
def folder(tmp_path: Path, space_text: str) -> Path:
    named = "{name: mlp, arguments: {in_features: 4, hidden: [24, 16]}}"
    assert named in space_text
    (tmp_path / "space.yaml").write_text(space_text.replace(named, "{factory: 'fickle:build'}"))
    (tmp_path / "fickle.py").write_text(MODEL)
    return tmp_path


def search(commands: Any, folder: Path, misbehave: str, *options: str) -> Any:
    return commands.run("search", "space.yaml", *options, cwd=folder, MISBEHAVE=misbehave, PYTHONPATH=path(folder))


def path(folder: Path) -> str:
    return f"{folder}:{Path(__file__).parents[2]}"


def kinds_of(reasons: list[str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for reason in reasons:
        if reason == "the same policy failed before":
            continue
        (kind,) = [kind for kind, words in REASONS.items() if words in reason]
        found[kind] += 1
    return found


def check(store: Any, kinds: set[str]) -> None:
    """Checks that a search ended whole, that trials failed for each of these reasons, and that MLflow tells them."""
    failed = [trial for trial in store.trials() if trial["state"] == "FAIL"]
    assert set(kinds_of([trial["user"]["reason"] for trial in failed])) == kinds
    assert store.distinct() == {"screen": 10, "tune": 5, "final": 4}
    runs = [run for run in store.runs("trial") if run["status"] == "FAILED"]
    recorded = {run["tags"]["autoprune.trial"]: run["tags"]["reason"] for run in runs}
    assert recorded == {trial["key"]: trial["user"]["reason"] for trial in failed}


# Not what the warm starts happen to be: random proposals of the seed.
QUICK = ("search.controls=0", "search.warm_starts=false", "search.sampler=random")
QUICK = tuple(part for setting in QUICK for part in ("--set", setting))


@pytest.mark.slow
def test_a_search_on_two_workers_survives_models_that_die_raise_and_give_nan(
    folder: Path, commands: Any, store_of: Any
) -> None:
    done = search(commands, folder, "raise nan fine fine fine die", "--workers", "2", *QUICK)
    assert done.status == 0, done.err
    check(store_of(folder), {"raise", "die", "nan"})


@pytest.mark.slow
def test_a_search_on_two_workers_survives_a_model_that_hangs(folder: Path, commands: Any, store_of: Any) -> None:
    done = search(commands, folder, "hang fine fine fine", "--workers", "2", "--set", "search.hang_timeout=15", *QUICK)
    assert done.status == 0, done.err
    check(store_of(folder), {"hang"})


def test_a_search_on_one_worker_survives_a_model_that_crashes_raises_and_gives_nan(
    folder: Path, commands: Any, store_of: Any
) -> None:
    done = search(commands, folder, "raise nan fine fine fine crash", "--workers", "1", *QUICK)
    assert done.status == 0, done.err
    assert "killed by SIGSEGV, a fault in native code" in done.err
    check(store_of(folder), {"raise", "crash", "nan"})
