"""A submitted space is the space that was written: its search goes on with what `autoprune search` had begun."""

from __future__ import annotations

import json
from pathlib import Path

import optuna
import pytest

from autoprune.coordinator import overview
from autoprune.coordinator.overview import Wanted, submit_space
from autoprune.search import Queue
from autoprune.space import load_space

FILES = sorted((Path(__file__).parents[3] / "search_spaces").glob("*.yaml"))[::4]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_what_a_job_stores_and_runs_has_the_fingerprint_of_the_file(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = optuna.storages.InMemoryStorage()
    monkeypatch.setattr(overview.studies, "open_storage", lambda place: storage)
    space = load_space(file, overrides=["recipe.lr=1e-05"], env={"AUTOPRUNE_DATA": "/data"}, allow_code=True)
    submit_space(space, Wanted(), home=tmp_path)
    stored = tmp_path / "stored.json"
    stored.write_text(json.dumps(Queue(storage).find(space.name).request.space, indent=1))
    again = load_space(stored, env={}, allow_code=True)
    assert again.fingerprint_sections() == space.fingerprint_sections()
    assert again == space
