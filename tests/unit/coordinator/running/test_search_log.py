"""The log of a search: what is written, that it stays small, and how it is read and followed."""

from __future__ import annotations

import json
import logging
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from autoprune.coordinator.running import log as running_log
from autoprune.coordinator.running.log import SearchLog, entry_of, follow_log, log_path, read_log, rendered
from autoprune.errors import StudyError
from autoprune.policy import Choice, Policy
from autoprune.results import Fidelity, TrialResult
from autoprune.studies import RungFinished, RungStarted, StoredTrial, TrialFinished


def result(accuracy: float = 0.75) -> TrialResult:
    return TrialResult(
        policy=Policy({"a": Choice("l2", 0.5)}),
        identity="x",
        fidelity=Fidelity("tune", 1.0),
        widths={"a": 4},
        costs={"macs": 10, "params": 3},
        metrics={"val_accuracy": accuracy},
        seconds={"surgery": 0.25, "finetune": 2.0},
    )


def ended(number: int, origin: int, *, result: TrialResult | None = None, reason: str | None = None) -> StoredTrial:
    policy, state = Policy({"a": Choice("l2", 0.5)}), "complete" if result else "fail"
    return StoredTrial(number, state, policy, "x", origin, "sampler", result=result, reason=reason)


def entries(home: Path, search: str = "one") -> list[dict[str, Any]]:
    return [json.loads(line) for line in read_log(home, search)]


def test_every_event_of_a_search_is_one_json_object_with_what_is_known_of_it(tmp_path: Path) -> None:
    with SearchLog(tmp_path, "one") as log:
        log.note("preparing")
        log.started(executor="process", workers=2, device="cpu", fingerprint="abc")
        log.told(RungStarted("tune", 8, 3))
        log.told(TrialFinished("tune", ended(3, 17, result=result())))
        log.told(TrialFinished("tune", ended(4, 18, reason="it diverged")))
        log.told(RungFinished("tune", 4, 1))
        log.finished(complete=True, front=4, hypervolume=0.5)
    found = entries(tmp_path)
    assert [e["event"] for e in found] == [
        "note",
        "search_started",
        "rung_started",
        "trial_finished",
        "trial_finished",
        "rung_finished",
        "search_finished",
    ]
    assert all({"time", "level", "search", "pid", "message"} <= set(entry) for entry in found)
    good, bad = found[3], found[4]
    assert (good["rung"], good["trial"], good["executor"], good["seconds"]) == ("tune", 3, "process", 2.25)
    assert (good["val_accuracy"], good["costs"]) == (0.75, {"macs": 10, "params": 3})
    assert (bad["level"], bad["state"], bad["reason"]) == ("warning", "fail", "it diverged")
    assert (found[-1]["complete"], found[-1]["front"]) == (True, 4)


def test_an_error_and_an_interruption_are_logged_as_the_end_and_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such thing"), SearchLog(tmp_path, "one"):
        raise StudyError("no such thing")
    with pytest.raises(KeyboardInterrupt), SearchLog(tmp_path, "one"):
        raise KeyboardInterrupt
    first, second = entries(tmp_path)
    assert (first["event"], first["level"], first["error"]) == ("search_failed", "error", "StudyError")
    assert (second["event"], second["level"]) == ("search_stopped", "warning")


def test_what_the_package_logs_meanwhile_is_in_the_log_and_afterwards_nothing_is(tmp_path: Path) -> None:
    before = (list(running_log.LOGGER.handlers), running_log.LOGGER.level)
    with SearchLog(tmp_path, "one"):
        logging.getLogger("autoprune.studies.storage").warning(
            "lost the connection to %s", "postgresql://me:geheim@db/x"
        )
    logging.getLogger("autoprune.search").warning("nobody is listening")
    (entry,) = entries(tmp_path)
    assert entry["event"] == "autoprune.studies.storage"
    assert entry["message"] == "lost the connection to postgresql://me:***@db/x"
    assert (running_log.LOGGER.handlers, running_log.LOGGER.level) == before


def test_a_log_stays_bounded_and_its_last_lines_are_kept_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_log, "MOST_BYTES", 2_000)
    with SearchLog(tmp_path, "one") as log:
        for number in range(200):
            log.note(f"sentence {number}")
    files = list((tmp_path / "logs").iterdir())
    assert len(files) == 1 + running_log.KEPT_FILES
    assert sum(file.stat().st_size for file in files) <= (1 + running_log.KEPT_FILES) * 2_000
    numbers = [int(entry["message"].split()[1]) for entry in entries(tmp_path)]
    assert numbers == list(range(numbers[0], 200))


def test_a_line_that_a_killed_process_left_unfinished_spoils_no_other(tmp_path: Path) -> None:
    with SearchLog(tmp_path, "one") as log:
        log.note("whole")
    with log_path(tmp_path, "one").open("a") as file:
        file.write('{"time": "2026-01-01T00')
    with SearchLog(tmp_path, "one") as log:
        log.note("goes on")
    assert [entry_of(line)["message"] for line in read_log(tmp_path, "one")] == [
        "whole",
        '{"time": "2026-01-01T00',
        "goes on",
    ]


def test_a_search_without_a_log_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="'nowhere' has no log"):
        read_log(tmp_path, "nowhere")


def test_a_log_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where a folder belongs")
    with pytest.raises(StudyError, match="cannot be written"):
        SearchLog(tmp_path, "one")


def test_following_sees_every_line_once_while_files_are_put_aside_and_ends_with_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_log, "MOST_BYTES", 8_000)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for turn in range(20):
            home = tmp_path / str(turn)
            with ThreadPoolExecutor(1) as pool:
                found = pool.submit(lambda home=home: list(follow_log(home, "one", over=lambda: True, pause=0.0)))
                with SearchLog(home, "one") as log:
                    for number in range(150):
                        log.note(f"sentence {number}")
                    log.finished(complete=True, front=1, hypervolume=0.1)
                seen = [entry_of(line)["message"] for line in found.result(30)]
            assert seen == [f"sentence {n}" for n in range(150)] + ["finished: 1 points on the front"]
    finally:
        sys.setswitchinterval(interval)


def test_following_goes_through_files_that_were_put_aside_between_two_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running_log, "MOST_BYTES", 2_000)
    with SearchLog(tmp_path, "one") as log:
        log.note("sentence 0")
        lines = follow_log(tmp_path, "one", over=lambda: True, pause=0.0)
        seen = [next(lines)]
        for number in range(1, 50):
            log.note(f"sentence {number}")
        log.finished(complete=True, front=1, hypervolume=0.1)
    assert len(list((tmp_path / "logs").iterdir())) == 1 + running_log.KEPT_FILES
    seen += lines
    assert [entry_of(line)["message"] for line in seen[:-1]] == [f"sentence {n}" for n in range(50)]


@pytest.mark.parametrize("reading", ["read", "follow"])
def test_a_file_that_is_put_aside_while_the_files_are_opened_is_neither_missed_nor_met_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reading: str
) -> None:
    monkeypatch.setattr(running_log, "MOST_BYTES", 2_000)
    opened: list[Path] = []

    with SearchLog(tmp_path, "one") as log:
        numbers = iter(range(1000))
        true_open = Path.open

        def moving(path: Path, mode: str = "r", **rest: Any) -> Any:
            file = true_open(path, mode, **rest)
            if mode == "rb" and not opened:
                opened.append(path)
                for _ in range(15):  # more than one file holds
                    log.note(f"sentence {next(numbers)}")
            return file

        for _ in range(15):
            log.note(f"sentence {next(numbers)}")
        assert running_log.KEPT_FILES > 2
        monkeypatch.setattr(Path, "open", moving)
        if reading == "read":
            found = read_log(tmp_path, "one")
        else:
            lines = follow_log(tmp_path, "one", over=lambda: True, pause=0.0)
            found = [next(lines)]
            log.finished(complete=True, front=1, hypervolume=0.1)
            found += list(lines)[:-1]
    seen = [int(entry_of(line)["message"].split()[1]) for line in found]
    assert opened
    assert seen == list(range(len(seen)))
    assert len(seen) == 30 if reading == "follow" else len(seen) >= 15


def test_a_line_for_people_holds_time_level_message_and_seconds(tmp_path: Path) -> None:
    entry = {
        "time": "2026-11-22T08:03:54.123+00:00",
        "level": "warning",
        "message": "tune trial 4 failed: it diverged",
        "seconds": 2.25,
    }
    assert rendered(entry) == "2026-11-22 08:03:54  WARNING tune trial 4 failed: it diverged (2.2 s)"
    assert rendered({"message": "torn"}).strip() == "torn"
