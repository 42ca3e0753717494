"""The recorder, with a tracker that is a plain object."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from autoprune.errors import TrackingError
from autoprune.tracking import Recorder, Tracker


class Store:
    """A tracker that notes what it is told and can be taken away."""

    def __init__(self) -> None:
        self.away = False
        self.noted: list[str] = []

    def note(self, text: str) -> None:
        self.ping()
        self.noted.append(text)

    def ping(self) -> None:
        if self.away:
            raise TrackingError("out of reach")


def start(store: Store, **options: Any) -> Recorder:
    def connect() -> Tracker:
        store.ping()
        return cast(Tracker, store)

    return Recorder(connect, interval=options.pop("interval", 0.02), **options)


def note(text: str) -> Any:
    return lambda store: store.note(text)


def test_jobs_are_done_in_the_order_they_came() -> None:
    store = Store()
    recorder = start(store)
    for number in range(20):
        recorder.put(note(str(number)), what="a note")
    assert recorder.close(5.0) == 0
    assert store.noted == [str(number) for number in range(20)]


def test_putting_a_job_never_waits_for_the_store() -> None:
    release = threading.Event()
    recorder = Recorder(lambda: (release.wait(5.0), cast(Tracker, Store()))[1])
    recorder.put(note("x"), what="a note")
    assert recorder.pending == 1
    release.set()
    assert recorder.close(5.0) == 0


def test_a_store_that_goes_away_halfway_is_told_of_each_job_once_when_it_is_back() -> None:
    store = Store()
    said: list[str] = []
    recorder = start(store, say=said.append)
    recorder.put(note("1"), what="a note")
    assert recorder.drain(5.0) == 0
    store.away = True
    recorder.put(note("2"), what="a note")
    recorder.put(note("3"), what="a note")
    assert recorder.drain(5.0) == 2
    store.away = False
    while recorder.drain(0.5):
        pass
    assert store.noted == ["1", "2", "3"]
    assert len(said) == 2
    recorder.close()


def test_between_two_attempts_lies_the_interval() -> None:
    tries: list[int] = []

    def connect() -> Tracker:
        tries.append(1)
        raise TrackingError("out of reach")

    recorder = Recorder(connect, interval=60.0)
    for _ in range(5):
        recorder.put(note("x"), what="a note")
    recorder.drain(5.0)
    assert len(tries) <= 2, "the first attempt, and one that drain may ask for"
    assert recorder.close(5.0) == 5
    assert len(tries) <= 3


def test_a_record_that_a_reachable_store_refuses_is_set_aside_and_the_others_follow() -> None:
    store = Store()
    said: list[str] = []

    def refuse(_tracker: Tracker) -> None:
        raise TrackingError("no such parameter")

    recorder = start(store, say=said.append)
    recorder.put(refuse, what="trial digits.tune/3")
    recorder.put(note("next"), what="a note")
    assert recorder.close(5.0) == 0
    assert store.noted == ["next"]
    assert [(r.what, r.reason) for r in recorder.refused] == [("trial digits.tune/3", "no such parameter")]
    assert said == ["MLflow refused trial digits.tune/3: no such parameter"]


def test_a_bug_in_a_job_is_raised_to_the_caller_and_not_hidden() -> None:
    recorder = start(Store())
    nothing: dict[str, int] = {}
    recorder.put(lambda _store: nothing["missing"], what="a broken job")
    with pytest.raises(KeyError, match="missing"):
        recorder.drain(5.0)
    with pytest.raises(KeyError, match="missing"):
        recorder.put(note("x"), what="a note")


def test_a_closed_recorder_takes_nothing_more() -> None:
    recorder = start(Store())
    recorder.close()
    with pytest.raises(RuntimeError, match="closed"):
        recorder.put(note("x"), what="a note")
