"""Processes that die, factories that fail, and parents that are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from functools import partial
from pathlib import Path

import pytest

from autoprune.errors import AutopruneError, CheckpointError, InputError, MissingExtraError, TrialError
from autoprune.executors import Beat, InlineExecutor, Limits, ProcessExecutor, RayExecutor, Share, processes

WAIT = 120


class TwoArguments(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def act(beat: Beat, kind: str, path: str = "") -> object:
    if kind == "pid":
        return os.getpid()
    if kind == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if kind == "die once":
        marker = Path(path)
        if not marker.exists():
            marker.write_text("died")
            os.kill(os.getpid(), signal.SIGKILL)
        return "survived"
    if kind == "exit":
        sys.exit(3)
    if kind == "unpicklable result":
        return lambda: None
    if kind == "unpicklable error":
        raise TwoArguments("one", "two")
    if kind == "hang":
        with Path(path).open("a") as file:
            file.write("began\n")
        time.sleep(60)
    if kind == "hang once":
        if not Path(path).exists():
            Path(path).write_text("hung")
            time.sleep(60)
        return "went on"
    if kind == "steady":  # longer than the silence that is allowed, but never silent
        for _ in range(30):
            time.sleep(0.1)
            beat()
        return "finished"
    if kind == "environment":
        return os.environ.get(path)
    if kind == "sleep":
        Path(path).write_text(str(os.getpid()))
        time.sleep(60)
    return kind


def factory(beat: Beat) -> Callable[..., object]:
    return partial(act, beat)


def broken_factory(beat: Beat) -> Callable[..., object]:
    raise OSError("no such device")


def factory_without_checkpoint(beat: Beat) -> Callable[..., object]:
    raise CheckpointError("model.pt does not exist")


def factory_that_dies(beat: Beat) -> Callable[..., object]:
    os._exit(9)


def factory_that_is_short(path: str, how: str, times: int, beat: Beat) -> Callable[..., object]:
    with Path(path).open("a+") as file:
        file.write("start\n")
        file.seek(0)
        if len(file.readlines()) <= times:
            if how == "memory":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGKILL)
    return partial(act, beat)


def gone(pid: int) -> bool:
    """Whether the process has ended within ten seconds; a zombie has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def wait_for(path: Path) -> int:
    for _ in range(400):
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    raise AssertionError(f"{path} was never written")


def test_an_interrupt_in_the_callers_thread_is_raised_at_once() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        InlineExecutor(lambda beat: interrupted).submit()


def test_a_task_whose_process_is_killed_once_is_repeated_in_a_new_one(tmp_path: Path) -> None:
    with ProcessExecutor(factory, 1) as executor:
        before = executor.submit("pid").result(timeout=WAIT)
        assert executor.submit("die once", str(tmp_path / "marker")).result(timeout=WAIT) == "survived"
        after = executor.submit("pid").result(timeout=WAIT)
    assert before != after


def test_a_task_that_kills_its_process_twice_fails_alone() -> None:
    with ProcessExecutor(factory, 2) as executor:
        deadly = executor.submit("die")
        others = [executor.submit("fine") for _ in range(4)]
        with pytest.raises(TrialError, match=r"died 2 times: killed by SIGKILL, perhaps for want of memory"):
            deadly.result(timeout=WAIT)
        assert [other.result(timeout=WAIT) for other in others] == ["fine"] * 4


def test_a_task_that_damages_its_process_tells_the_signal_and_what_it_means() -> None:
    reason = r"died 2 times: killed by SIGSEGV, a fault in native code: memory that is not its own"
    with ProcessExecutor(factory, 1) as executor:
        with pytest.raises(TrialError, match=reason):
            executor.submit("crash").result(timeout=WAIT)
        assert executor.submit("fine").result(timeout=WAIT) == "fine"


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGABRT, "killed by SIGABRT, a fault in native code such as a damaged heap"),
        (signal.SIGKILL, "killed by SIGKILL, perhaps for want of memory"),
        (signal.SIGHUP, "killed by SIGHUP"),
        (40, "killed by signal 40"),  # a real-time signal, which has no name
    ],
)
def test_every_signal_has_words(number: int, words: str) -> None:
    assert processes.killed_by(number) == words


def test_a_task_that_exits_its_process_tells_the_status() -> None:
    with ProcessExecutor(factory, 1) as executor, pytest.raises(TrialError, match="exit status 3"):
        executor.submit("exit").result(timeout=WAIT)


def test_a_task_that_hangs_is_killed_and_tried_once_more(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessExecutor(factory, 2, limits=Limits(silence=1.5)) as executor:
        hanging = executor.submit("hang", str(log))
        assert executor.submit("hang once", str(tmp_path / "once")).result(timeout=WAIT) == "went on"
        with pytest.raises(TrialError, match=r"made no progress for 1\.5 s, 2 times"):
            hanging.result(timeout=WAIT)
        assert executor.submit("fine").result(timeout=WAIT) == "fine"
    assert log.read_text() == "began\n" * 2


def test_a_long_task_that_makes_progress_does_not_hang() -> None:
    with ProcessExecutor(factory, 1, limits=Limits(silence=2.0)) as executor:
        assert executor.submit("steady").result(timeout=WAIT) == "finished"


def test_a_silent_task_over_its_time_limit_is_killed_and_not_repeated(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with ProcessExecutor(factory, 1, limits=Limits(timeout=0.5)) as executor:
        with pytest.raises(TrialError, match=r"longer than its limit of 0\.5 s"):
            executor.submit("hang", str(log)).result(timeout=WAIT)
        assert executor.submit("fine").result(timeout=WAIT) == "fine"
    assert log.read_text() == "began\n"


def test_a_task_over_its_time_limit_ends_by_itself_where_it_makes_progress() -> None:
    with ProcessExecutor(factory, 1, limits=Limits(timeout=0.5)) as executor:
        before = executor.submit("pid").result(timeout=WAIT)
        with pytest.raises(TrialError, match=r"longer than its limit of 0\.5 s"):
            executor.submit("steady").result(timeout=WAIT)
        assert executor.submit("pid").result(timeout=WAIT) == before


@pytest.mark.parametrize("limits", [{"timeout": 0.0}, {"silence": -1.0}, {"timeout": float("nan")}])
def test_limits_without_sense_are_refused(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Limits(**limits)


def test_each_process_sees_the_environment_of_its_own_slot_even_after_a_restart() -> None:
    own = [{"AUTOPRUNE_SLOT": "one"}, {"AUTOPRUNE_SLOT": "two"}]
    with ProcessExecutor(factory, 2, environments=own) as executor:
        for _ in range(2):
            seen = {executor.submit("environment", "AUTOPRUNE_SLOT").result(timeout=WAIT) for _ in range(8)}
            assert seen <= {"one", "two"}
            assert isinstance(executor.submit("die").exception(timeout=WAIT), TrialError)
    with ProcessExecutor(factory, 1, environments=own) as executor:
        assert executor.submit("environment", "AUTOPRUNE_SLOT").result(timeout=WAIT) == "one"
    assert "AUTOPRUNE_SLOT" not in os.environ


def test_without_ray_its_executor_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'autoprune\[ray\]'"):
        RayExecutor(factory, "local")


@pytest.mark.parametrize(("cpus", "gpus"), [(0.0, 0.0), (-1.0, 0.0), (1.0, -0.5), (1.0, 1.5), (float("nan"), 0.0)])
def test_a_share_of_a_node_without_sense_is_refused(cpus: float, gpus: float) -> None:
    with pytest.raises(InputError, match=r"needs processors|a fraction of one or a whole number"):
        Share(cpus, gpus)


def test_an_error_of_the_factory_comes_out_of_every_task_with_its_cause() -> None:
    with ProcessExecutor(broken_factory, 1) as executor:
        for _ in range(2):
            with pytest.raises(AutopruneError, match="could not start: OSError: no such device") as caught:
                executor.submit("fine").result(timeout=WAIT)
            assert not isinstance(caught.value, TrialError)


def test_bad_input_that_the_factory_finds_stays_bad_input() -> None:
    with ProcessExecutor(factory_without_checkpoint, 1) as executor:
        error = executor.submit("fine").exception(timeout=WAIT)
    assert isinstance(error, CheckpointError)
    assert str(error) == "model.pt does not exist"


def test_a_process_that_dies_while_starting_stops_the_search_and_not_only_a_trial() -> None:
    with ProcessExecutor(factory_that_dies, 1) as executor:
        error = executor.submit("fine").exception(timeout=WAIT)
    assert isinstance(error, AutopruneError)
    assert not isinstance(error, TrialError)
    assert "ended before it was ready (exit status 9)" in str(error)


@pytest.mark.parametrize("how", ["kill", "memory"])
def test_a_start_that_finds_no_memory_is_repeated_until_there_is_some(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "PAUSES", (0.01, 0.02))
    with ProcessExecutor(partial(factory_that_is_short, str(tmp_path / "starts"), how, 2), 1) as executor:
        assert executor.submit("fine").result(timeout=WAIT) == "fine"
        with pytest.raises(TrialError, match="died 2 times"):  # its own deaths are counted for themselves
            executor.submit("die").result(timeout=WAIT)
    assert (tmp_path / "starts").read_text().count("start") >= 4


def test_a_machine_that_stays_short_of_memory_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSES", (0.01, 0.02))
    with ProcessExecutor(partial(factory_that_is_short, str(tmp_path / "starts"), "memory", 9), 1) as executor:
        error = executor.submit("fine").exception(timeout=WAIT)
    assert isinstance(error, AutopruneError)
    assert not isinstance(error, TrialError)
    assert "ended before it was ready (no memory left)" in str(error)
    assert (tmp_path / "starts").read_text() == "start\n" * 3


def test_an_executor_that_waits_for_memory_closes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSES", (3600.0, 3600.0))
    executor = ProcessExecutor(partial(factory_that_is_short, str(tmp_path / "starts"), "kill", 9), 1)
    waiting = executor.submit("fine")
    slot = executor._slots[0]
    for _ in range(1000):
        if (tmp_path / "starts").exists() and slot._pipe is None:  # its first process is dead: it waits
            break
        time.sleep(0.02)
    executor.close()
    assert waiting.done()
    assert not slot._thread.is_alive()


@pytest.mark.parametrize(("kind", "words"), [("unpicklable result", "function"), ("unpicklable error", "one and two")])
def test_what_cannot_be_sent_back_is_a_clear_error(kind: str, words: str) -> None:
    with ProcessExecutor(factory, 1) as executor:
        with pytest.raises(AutopruneError, match=f"{words}.*cannot be sent between processes"):
            executor.submit(kind).result(timeout=WAIT)
        assert executor.submit("fine").result(timeout=WAIT) == "fine"


def test_closing_ends_a_busy_process_and_cancels_what_waits(tmp_path: Path) -> None:
    executor = ProcessExecutor(factory, 1)
    busy = executor.submit("sleep", str(tmp_path / "pid"))
    waiting = executor.submit("fine")
    pid = wait_for(tmp_path / "pid")
    executor.close()
    assert gone(pid)
    with pytest.raises(AutopruneError, match="closed before the task was done"):
        busy.result(timeout=0)
    with pytest.raises(CancelledError):
        waiting.result(timeout=0)


PARENT = """
import sys
from tests_executors_child import factory
from autoprune.executors import ProcessExecutor
if __name__ == "__main__":
    with ProcessExecutor(factory, 1) as executor:
        executor.submit(sys.argv[1]).result()
"""
CHILD = """
import os, time
from pathlib import Path
def act(path):
    Path(path).write_text(str(os.getpid()))
    time.sleep(60)
def factory(beat):
    return act
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "tests_executors_child.py").write_text(CHILD)
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "pid")]
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, cwd=tmp_path, start_new_session=True)
    pid = wait_for(tmp_path / "pid")
    if number == signal.SIGINT:  # Ctrl-C reaches the whole group
        os.killpg(parent.pid, number)
    else:
        parent.send_signal(number)
    _, errors = parent.communicate(timeout=WAIT)
    assert parent.returncode != 0
    assert gone(pid)
    assert errors.count(b"Traceback") <= 1
