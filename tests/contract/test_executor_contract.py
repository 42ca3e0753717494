"""Every executor keeps the same promises to its caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from autoprune.errors import AutopruneError, TrialError
from autoprune.executors import Beat, Executor, InlineExecutor, Limits, ProcessExecutor, RayExecutor

LIMIT = 1.0
WAIT = 240


def work(beat: Beat, kind: str, value: int = 0) -> int:
    if kind == "double":
        return 2 * value
    if kind == "trial":
        raise TrialError("loss is nan in epoch 3")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    for _ in range(100):  # "long"
        time.sleep(0.05)
        beat()
    return value


def factory(beat: Beat) -> Callable[..., int]:
    return partial(work, beat)


KINDS = ["inline", "processes", pytest.param("ray", marks=pytest.mark.slow)]


def make(kind: str) -> Executor:
    limits = Limits(timeout=LIMIT, silence=60.0)
    if kind == "ray":
        pytest.importorskip("ray")
        return RayExecutor(factory, "local", workers=2, limits=limits)
    if kind == "inline":
        return InlineExecutor(factory, limits)
    return ProcessExecutor(factory, 2, limits=limits)


@pytest.fixture(scope="module", params=KINDS)
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    with make(request.param) as made:
        yield made


def test_futures_hold_the_values_of_their_own_arguments(executor: Executor) -> None:
    futures = [executor.submit("double", i) for i in range(7)]
    assert [future.result(timeout=WAIT) for future in futures] == [0, 2, 4, 6, 8, 10, 12]


def test_an_error_comes_out_of_its_future_as_it_was_and_later_tasks_go_on(executor: Executor) -> None:
    failing = executor.submit("trial")
    error = failing.exception(timeout=WAIT)
    assert isinstance(error, TrialError)
    assert str(error) == "loss is nan in epoch 3"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        executor.submit("bug").result(timeout=WAIT)
    assert executor.submit("double", 4).result(timeout=WAIT) == 8


def test_a_task_over_its_time_limit_fails_and_later_tasks_have_their_own_time(executor: Executor) -> None:
    for _ in range(2):
        with pytest.raises(TrialError, match="took longer than its limit of 1 s"):
            executor.submit("long").result(timeout=WAIT)
    assert executor.submit("double", 4).result(timeout=WAIT) == 8


def test_the_number_of_workers_is_told(executor: Executor) -> None:
    assert executor.workers in (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_closed_executor_refuses_tasks_and_may_be_closed_again(kind: str) -> None:
    made = make(kind)
    made.close()
    made.close()
    with pytest.raises(AutopruneError, match="closed"):
        made.submit("double", 1)
