"""Every executor keeps the same promises to its caller."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest

from autoprune.errors import AutopruneError, TrialError
from autoprune.executors import Executor, InlineExecutor, ProcessExecutor


def work(kind: str, value: int = 0) -> int:
    if kind == "double":
        return 2 * value
    if kind == "trial":
        raise TrialError("loss is nan in epoch 3")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    time.sleep(value)
    return value


def factory() -> Callable[..., int]:
    return work


@pytest.fixture(scope="module", params=["inline", "processes"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    made: Executor = InlineExecutor(work) if request.param == "inline" else ProcessExecutor(factory, 2)
    with made:
        yield made


def test_futures_hold_the_values_of_their_own_arguments(executor: Executor) -> None:
    futures = [executor.submit("double", i) for i in range(7)]
    assert [future.result(timeout=30) for future in futures] == [0, 2, 4, 6, 8, 10, 12]


def test_an_error_comes_out_of_its_future_as_it_was_and_later_tasks_go_on(executor: Executor) -> None:
    failing = executor.submit("trial")
    error = failing.exception(timeout=30)
    assert isinstance(error, TrialError)
    assert str(error) == "loss is nan in epoch 3"
    with pytest.raises(ZeroDivisionError, match="a bug"):
        executor.submit("bug").result(timeout=30)
    assert executor.submit("double", 4).result(timeout=30) == 8


def test_the_number_of_workers_is_told(executor: Executor) -> None:
    assert executor.workers in (1, 2)


@pytest.mark.parametrize("kind", ["inline", "processes"])
def test_a_closed_executor_refuses_tasks_and_may_be_closed_again(kind: str) -> None:
    made: Executor = InlineExecutor(work) if kind == "inline" else ProcessExecutor(factory, 1)
    made.close()
    made.close()
    with pytest.raises(AutopruneError, match="closed"):
        made.submit("double", 1)
