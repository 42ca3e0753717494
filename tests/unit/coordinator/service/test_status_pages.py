"""The status page: what it shows, to whom, and what a watchdog reads."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from autoprune import report
from autoprune.coordinator.service import pages
from autoprune.errors import StudyError

ROW = {"rung": "tune", "done": 3, "total": 8, "best": 0.951, "seconds_left": 75.0, "priority": 2, "reason": "here"}
DATA: dict[str, Any] = {
    "home": "/somewhere/<b>",
    "runner": True,
    "service": {
        "pid": 7,
        "host": "here",
        "services": [
            {"name": "mlflow", "state": "healthy", "address": "http://127.0.0.1:5000", "restarts": 0, "reason": ""},
            {"name": "runner", "state": "waiting", "address": None, "restarts": 3, "reason": "killed <i>"},
        ],
    },
    "rows": [
        {"name": "one", "state": "running", **ROW},
        {"name": "two", "state": "queued", **ROW, "rung": None, "done": 0, "total": None, "best": None},
    ],
}


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(pages, "status_of", lambda home: DATA)
    with pages.open_page(tmp_path, 0) as address:
        yield address


def get(address: str, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(str(urlsplit(address).netloc), timeout=10)
    connection.request("GET", path, headers=headers)
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def test_people_see_processes_searches_and_what_to_type_and_nothing_is_taken_for_markup(address: str) -> None:
    status, text = get(address, "/")
    assert status == 200
    for shown in ("one", "3/8", "95.1%", "1 min 15 s", "killed &lt;i&gt;", "/somewhere/&lt;b&gt;", "autoprune submit"):
        assert shown in text
    assert '<a href="http://127.0.0.1:5000">' in text
    assert "<script" not in text


def test_programs_read_json_and_a_watchdog_what_is_not_healthy(address: str) -> None:
    status, text = get(address, "/status.json")
    assert (status, json.loads(text)) == (200, DATA)
    assert get(address, "/health") == (503, "not healthy: runner\n")


def test_another_host_name_is_refused_and_another_page_is_not_there(address: str) -> None:
    assert get(address, "/", Host="evil.example.com")[0] == 403
    assert get(address, "/", Host="localhost")[0] == 200
    assert get(address, "/../etc/passwd")[0] == 404


def test_a_storage_that_is_away_is_told_and_the_page_is_back_with_it(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(home: Path) -> dict[str, Any]:
        raise StudyError("the database is away")

    monkeypatch.setattr(pages, "status_of", away)
    assert get(address, "/") == (503, "the database is away\n")
    monkeypatch.setattr(pages, "status_of", lambda home: DATA)
    assert get(address, "/")[0] == 200


def test_the_terminal_shows_the_same() -> None:
    text = report.render_status(DATA)
    assert "Service (process 7 on here)" in text
    assert "killed <i>" in text
    assert "1 min 15 s" in text
    without = report.render_status({**DATA, "service": None, "runner": False})
    assert "1 search waits for `autoprune serve`" in without
