"""Proposals made in a process of their own, while the coordinator stores what came back.

Decides how many proposals are in stock, what the process is told, and what happens when it dies. For many workers the
learned additive model, 10 to 20 ms a proposal, and the storing of results, 10 ms a trial, do not fit into one process:
64 workers of a second each want a proposal every 16 ms. Knows nothing of how a proposal comes about.
"""

from __future__ import annotations

import os
import pickle
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, Self

from autoprune.errors import AutopruneError, BudgetError
from autoprune.policy import Policy
from autoprune.results import TrialResult

_DEATHS = 3
"""So many deaths of the process without a proposal in between end the search."""


class Model(Protocol):
    """Proposes policies from all results so far."""

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        """Returns the next proposal."""
        ...


class Ahead:
    """A proposer whose model lives in a process of its own and works `stock` proposals ahead.

    A proposal knows the results that were there when it was ordered, `stock` proposals before it is handed out: which
    proposals come depends on the order of the results and not on how fast the process is. The process starts with the
    first proposal, does not import the caller's main module, and ends with the context or with this process. One that
    dies is started again.

    Args:
        make: Makes the model from the number of proposals that were made before; picklable, of autoprune's own code.
        stock: Proposals that are made ahead.
        rest: As a `Proposer` has it.
        done: How many proposals were made before.
    """

    def __init__(self, make: Callable[[int], Model], *, stock: int, rest: int, done: int = 0) -> None:
        self.rest = rest
        self._make = make
        self._stock = stock
        self._number = done
        self._told: list[TrialResult] = []
        self._orders: list[int] = []
        """How many results each ordered proposal knows."""
        self._process: subprocess.Popen[bytes] | None = None
        self._deaths = 0

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        """Returns the next proposal and orders another one, for `results`: those of the call before, and new ones.

        Raises:
            BudgetError: No policy meets the budget.
            AutopruneError: The process dies again and again.
        """
        new = list(results[len(self._told) :])
        self._told += new
        orders = self._stock + 1 - len(self._orders)
        self._orders += [len(self._told)] * orders
        while True:
            try:
                if self._process is None:
                    self._start()
                else:
                    self._send((new, orders))
                value = self._receive()
                break
            except (EOFError, OSError, pickle.UnpicklingError) as error:
                self._deaths += 1
                status = self._end()
                if self._deaths >= _DEATHS:
                    raise AutopruneError(
                        f"the process that proposes policies died {_DEATHS} times (exit status {status})"
                    ) from error
        self._deaths = 0
        self._number += 1
        del self._orders[0]
        if isinstance(value, Exception):
            raise value
        assert isinstance(value, Policy)
        return value

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _start(self) -> None:
        """Starts a process and gives it every order that is open, each with the results that it is to know."""
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from autoprune.studies.ahead import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # Ctrl-C is for the coordinator
        )
        self._send((self._make, self._number))
        known = 0
        for count in self._orders:
            self._send((self._told[known:count], 1))
            known = max(known, count)

    def _send(self, message: object) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump(message, self._process.stdin, protocol=pickle.HIGHEST_PROTOCOL)
        self._process.stdin.flush()

    def _receive(self) -> object:
        assert self._process is not None
        assert self._process.stdout is not None
        return pickle.load(self._process.stdout)

    def _end(self) -> int | None:
        """Sees a process off that has closed its pipes; returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what is buffered for a dead process
                    pipe.close()
        process.kill()
        return process.wait()


def serve() -> None:
    """What the process does: answers each order with a policy, until the process that gives them ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints is no answer
    make, done = pickle.load(sys.stdin.buffer)
    orders: queue.SimpleQueue[tuple[list[TrialResult], int]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    model: Model = make(done)
    results: list[TrialResult] = []
    while True:
        new, count = orders.get()
        results += new
        for _ in range(count):
            pickle.dump(_proposal(model, results), answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()


def _listen(orders: queue.SimpleQueue[tuple[list[TrialResult], int]]) -> None:
    """Takes orders at once, so that neither side ever waits with a full pipe for the other."""
    try:
        while True:
            orders.put(pickle.load(sys.stdin.buffer))
    finally:
        os._exit(0)


def _proposal(model: Model, results: Sequence[TrialResult]) -> Policy | BudgetError:
    try:
        return model.propose(results)
    except BudgetError as error:
        return error
