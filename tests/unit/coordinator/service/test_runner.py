"""The runner: who gets a slot, what is tried again, and what a restart finds, with processes that only pretend."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest

from autoprune.coordinator.service.runner import ATTEMPTS, Runner, SearchProcesses, Slot, slots_of
from autoprune.studies import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job, Queue, Request


class Pretended:
    """A process that ends when a test says so."""

    def __init__(self, name: str, slot: Slot, timeout: float | None) -> None:
        self.name, self.slot, self.timeout = name, slot, timeout
        self.status: int | None = None
        self.asked = False

    def ended(self) -> int | None:
        return self.status

    def ask(self) -> None:
        self.asked = True


class World:
    """A queue with a runner in a world whose clock, searches and processes a test moves."""

    def __init__(self, slots: int = 1, slice_seconds: float = 100.0) -> None:
        self.storage = optuna.storages.InMemoryStorage()
        self.now = 1000.0
        self.trials: dict[str, int] = {}
        self.elsewhere: dict[str, str] = {}
        self.started: list[Pretended] = []
        self.words = ""
        self.gone: set[str] = set()
        self.queue = Queue(self.storage)
        self._slots, self._slice = slots, slice_seconds
        self.restart()

    def restart(self) -> None:
        slots = [Slot((i,)) for i in range(self._slots)]
        self.runner = Runner(self.queue, self, self, slots=slots, slice_seconds=self._slice, clock=lambda: self.now)

    def finished(self, name: str) -> int:
        return self.trials.get(name, 0)

    def holder(self, name: str) -> str | None:
        return self.elsewhere.get(name)

    def start(self, job: Job, slot: Slot, *, timeout: float | None) -> Pretended:
        if job.name in self.gone:
            raise FileNotFoundError(2, "No such file or directory", job.request.directory)
        self.started.append(Pretended(job.name, slot, timeout))
        return self.started[-1]

    def end_all(self, processes: Sequence[Any]) -> None:
        for process in processes:
            process.status = -signal.SIGTERM if process.status is None else process.status

    def reason(self, job: Job) -> str:
        return self.words

    def submit(self, *names: str, **changes: Any) -> None:
        for name in names:
            self.now += 1.0
            self.queue.submit(Request(**{"name": name, "space": {}, "directory": "/d", **changes}), now=self.now)

    def step(self, seconds: float = 1.0) -> None:
        self.now += seconds
        self.runner.step()

    @property
    def running(self) -> list[str]:
        return [process.name for process in self.started if process.status is None]

    def states(self) -> dict[str, str]:
        return {job.name: job.state for job in self.queue.jobs()}


def test_jobs_run_one_after_the_other_in_the_order_of_priority_and_age() -> None:
    world = World()
    world.submit("a", "b")
    world.submit("urgent", priority=1)
    order = []
    for _ in range(3):
        world.step()
        (name,) = world.running
        order.append(name)
        world.started[-1].status = 0
    world.step()
    assert order == ["urgent", "a", "b"]
    assert set(world.states().values()) == {DONE}


def test_as_many_run_at_once_as_there_are_slots_and_each_has_its_own() -> None:
    world = World(slots=2)
    world.submit("a", "b", "c")
    world.step()
    assert world.running == ["a", "b"]
    assert [process.slot for process in world.started] == [Slot((0,)), Slot((1,))]
    world.started[1].status = 0
    world.step()
    assert world.running == ["a", "c"]
    assert world.started[-1].slot == Slot((1,))


def test_a_search_that_had_its_slice_makes_room_for_one_that_waits_and_goes_on_after_it() -> None:
    world = World()
    world.submit("long", "short")
    world.step()
    world.step(99)
    assert not world.started[0].asked
    world.step(2)
    assert world.started[0].asked
    world.started[0].status = 143
    world.step()
    assert world.running == ["short"]
    assert world.queue.find("long").reason == "made room for others"
    world.started[1].status = 0
    world.step()
    assert world.running == ["long"]
    assert world.queue.find("long").attempts == 1


def test_nobody_makes_room_for_a_lower_priority_or_for_nobody() -> None:
    world = World()
    world.submit("alone", priority=1)
    world.step()
    world.submit("lesser")
    world.step(1000)
    assert not world.started[0].asked
    world.submit("equal", priority=1)
    world.step()
    assert world.started[0].asked


def test_only_as_many_make_room_as_others_wait() -> None:
    world = World(slots=3)
    world.submit("a", "b", "c", "d")
    world.step()
    world.step(500)
    world.step(1)
    assert [process.asked for process in world.started] == [True, False, False]


def test_a_search_that_is_killed_begins_again_after_a_while_and_one_that_never_gets_on_fails() -> None:
    world = World()
    world.submit("a")
    pauses = []
    for attempt in range(1, ATTEMPTS + 1):
        waited = 0
        while not world.running:
            world.step()
            waited += 1
        pauses.append(waited)
        assert world.queue.find("a").attempts == attempt
        world.started[-1].status = -signal.SIGKILL
        world.step()
    job = world.queue.find("a")
    assert (job.state, job.reason) == (
        FAILED,
        "the search was killed by SIGKILL, 5 times without finishing another trial",
    )
    assert pauses[1:] == sorted(pauses[1:])
    assert pauses[-1] > 2 * pauses[1]


def test_a_search_that_is_killed_but_gets_on_never_fails() -> None:
    world = World()
    world.submit("a")
    for attempt in range(3 * ATTEMPTS):
        while not world.running:
            world.step(5)
        world.trials["a"] = attempt + 1
        world.started[-1].status = -signal.SIGKILL
        world.step()
    assert world.states() == {"a": QUEUED}


def test_a_search_that_refuses_fails_at_once_with_its_last_words_and_the_next_one_runs() -> None:
    world = World()
    world.submit("bad", "good")
    world.words = "space.json has 1 fault"
    world.step()
    world.started[0].status = 2
    world.step()
    job = world.queue.find("bad")
    assert (job.state, job.reason) == (FAILED, "space.json has 1 fault")
    assert world.running == ["good"]


def test_a_search_whose_directory_is_gone_fails_and_keeps_no_slot() -> None:
    world = World()
    world.submit("bad", "good")
    world.gone.add("bad")
    world.step()
    assert world.queue.find("bad").reason == "cannot be begun: /d: No such file or directory"
    assert world.running == ["good"]


def test_cancelled_a_job_that_waits_never_begins_and_one_that_runs_is_ended() -> None:
    world = World()
    world.submit("a", "b")
    world.step()
    for name in ("a", "b"):
        world.queue.ask_to_cancel(world.queue.find(name))
    world.step()
    assert world.started[0].asked
    world.started[0].status = 143
    world.step()
    assert world.states() == {"a": CANCELLED, "b": CANCELLED}
    assert len(world.started) == 1
    assert all(job.ended is not None for job in world.queue.jobs())


def test_a_cancelled_search_that_finished_in_the_same_moment_is_done() -> None:
    world = World()
    world.submit("a")
    world.step()
    world.queue.ask_to_cancel(world.queue.find("a"))
    world.started[0].status = 0
    world.step()
    assert world.states() == {"a": DONE}


def test_after_everything_was_killed_jobs_go_on_but_for_those_that_were_cancelled() -> None:
    world = World(slots=2)
    world.submit("a", "b", "c")
    world.step()
    world.queue.ask_to_cancel(world.queue.find("b"))
    world.started.clear()
    world.restart()
    world.runner.adopt()
    assert world.states() == {"a": QUEUED, "b": CANCELLED, "c": QUEUED}
    world.step()
    assert world.running == ["a", "c"]


def test_a_search_that_brings_the_service_down_again_and_again_lets_others_go_first_and_fails_in_the_end() -> None:
    world = World()
    world.submit("poison", "good")
    first = []
    while world.states()["poison"] != FAILED:
        world.step()
        first.append(world.started[-1].name)
        world.started.clear()
        world.restart()
        world.runner.adopt()
    assert first[:2] == ["poison", "poison"]
    assert "good" in first
    assert first.count("poison") == ATTEMPTS
    assert world.queue.find("poison").reason == "the service ended, 5 times without finishing another trial"


def test_stopped_cleanly_the_runner_leaves_jobs_first_in_line_and_counts_no_attempt() -> None:
    world = World()
    world.submit("a", "b")
    world.step()
    world.runner.stop()
    assert world.states() == {"a": QUEUED, "b": QUEUED}
    assert world.queue.find("a").attempts == 0
    world.restart()
    world.runner.adopt()
    world.step()
    assert world.running == ["a"]


def test_the_time_limit_counts_over_all_calls_and_ends_the_job() -> None:
    world = World()
    world.submit("a", timeout=100.0)
    world.step()
    assert world.started[0].timeout == 100.0
    world.now += 60.0
    world.started[0].status = -signal.SIGKILL
    world.step()
    world.step(10)
    assert world.started[1].timeout == pytest.approx(39.0)
    world.now += 50.0
    world.started[1].status = -signal.SIGKILL
    world.step()
    world.step(30)
    job = world.queue.find("a")
    assert (job.state, job.reason) == (DONE, "the time limit ended the search")


def test_a_search_that_somebody_else_runs_waits_and_says_for_whom() -> None:
    world = World()
    world.submit("a", "b")
    world.elsewhere["a"] = "process 7 on here"
    world.step()
    assert world.running == ["b"]
    assert world.queue.find("a").reason == "process 7 on here runs it"
    world.elsewhere.clear()
    world.started[0].status = 0
    world.step()
    assert world.running == ["a"]
    assert world.queue.find("a").state == RUNNING
    assert world.queue.find("a").reason == ""


def test_slots_share_out_the_cores_and_the_named_gpus() -> None:
    assert slots_of(1, cores=[0, 1], gpus="0,1") == (Slot(),)
    assert slots_of(2, cores=[0, 1, 2, 3, 4], gpus=None) == (Slot((0, 2, 4)), Slot((1, 3)))
    assert slots_of(3, cores=[4, 6], gpus="0,1") == (Slot((4,), "0"), Slot((6,), "1"), Slot((4,), "0"))


def test_a_search_is_started_on_its_whole_space_in_the_directory_of_its_submission(tmp_path: Path) -> None:
    package = tmp_path / "fake" / "autoprune"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(
        "import os, sys, json\n"
        "print(json.dumps([os.getcwd(), sys.argv[1:], os.environ.get('CUDA_VISIBLE_DEVICES')]))\n"
        "print('autoprune: it is over: postgresql://me:geheim@db/x', file=sys.stderr)\n"
        "raise SystemExit(2)\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    starter = SearchProcesses(tmp_path / "home", {**os.environ, "PYTHONPATH": str(package.parent)})
    queue = Queue(optuna.storages.InMemoryStorage())
    request = Request("one", {"schema": 1, "name": "one"}, str(work), trials=5, workers=2, extra=("--allow-code",))
    job = queue.submit(request, now=0.0)
    child = starter.start(job, Slot(None, "3"), timeout=9.5)
    end = time.monotonic() + 30
    while child.ended() is None and time.monotonic() < end:
        time.sleep(0.01)
    assert child.ended() == 2
    directory, arguments, gpus = json.loads(starter.output(job).read_text().splitlines()[0])
    space = tmp_path / "home" / "jobs" / "0-one.json"
    assert (directory, gpus) == (str(work), "3")
    assert arguments == [
        *("search", str(space), "--home", str(tmp_path / "home")),
        *("--trials", "5", "--workers", "2", "--timeout", "9.5", "--allow-code"),
    ]
    assert json.loads(space.read_text()) == {"schema": 1, "name": "one"}
    assert starter.reason(job) == "it is over: postgresql://me:***@db/x"


@pytest.mark.parametrize("name", ["../../escaped", "/../../../escaped", "a/b", "..", ""])
def test_a_job_whose_name_would_leave_the_home_folder_is_never_begun(tmp_path: Path, name: str) -> None:
    queue = Queue(optuna.storages.InMemoryStorage())
    job = queue.submit(Request(name, {"schema": 1}, str(tmp_path)), now=0.0)
    with pytest.raises(PermissionError, match="no name of a search"):
        SearchProcesses(tmp_path / "deep" / "home", {}).start(job, Slot(None, None), timeout=None)
    assert list(tmp_path.iterdir()) == []
