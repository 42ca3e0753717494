"""How busy one coordinator keeps many workers: `make busy-workers`.

64 simulated workers of a second a trial are fed by the product's own ladder, with its proposals, its SQLite storage and
a stored trial for each. Printed is the share of their time that the workers were busy, from the first start to the last
result, without the last `workers` trials, for which there is nothing more to start.

Time is the coordinator's processor time, and jumps to the next result where the coordinator would sleep: the figures
are those of a machine whose cores do nothing else (one for the coordinator and, where proposals are made ahead, one for
the process that makes them), and other work here does not change them. `--real` runs threads that sleep and the
product's own process instead, for a machine that is really free. Waiting for the disk is part of the real run alone.
`--ray` is a real run, too: the tasks sleep in processes of a Ray cluster of this machine, each with a fraction of a
processor. 64 of them take 6 GB.
"""

from __future__ import annotations

import argparse
import os
import pickle
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage_cost import problem_of

from autoprune.executors import RayExecutor, Share
from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.studies import ladder, open_storage, rung
from autoprune.studies.ladder import LadderPlan, RungPlan, run_ladder
from autoprune.studies.sampler import widths_of

SECONDS = 1.0
GROUPS = 12
TABLES = {
    group.name: {
        name: [(1 + i) * (1 - width / 64) ** (2 + k) / 78 for width in range(65)]
        for k, name in enumerate(problem_of(GROUPS).criteria)
    }
    for i, group in enumerate(problem_of(GROUPS).groups)
}
"""What the learned model reads, and what the simulated trials measure: later layers matter more."""


def measured(problem: Problem, policy: Policy, fidelity: Fidelity) -> TrialResult:
    widths = widths_of(problem, policy)
    loss = sum(TABLES[name][policy.choices[name].criterion][width] for name, width in widths.items())
    metrics = {"val_accuracy": 1 - loss, "val_loss": loss}
    return TrialResult(policy, policy.id, fidelity, widths, problem.costs(policy), metrics)


class Threads:
    """Workers that sleep for `SECONDS` a task, and a record of when they ran."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.spans: list[tuple[float, float]] = []
        self._problem = problem
        self._pool = ThreadPoolExecutor(count)
        self._lock = threading.Lock()

    def submit(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        return self._pool.submit(self._evaluate, policy, fidelity)

    def _evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        begun = time.monotonic()
        time.sleep(SECONDS)
        result = measured(self._problem, policy, fidelity)
        with self._lock:
            self.spans.append((begun, time.monotonic()))
        return result


def nap(beat: Callable[[], None]) -> Callable[[float], tuple[float, float]]:
    """What a process of the cluster does for a task: it tells from when to when it slept."""

    def sleep(seconds: float) -> tuple[float, float]:
        begun = time.time()
        time.sleep(seconds)
        return begun, time.time()

    return sleep


class OnRay:
    """Workers that are processes of a Ray cluster of this machine."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.spans: list[tuple[float, float]] = []
        self._problem = problem
        share = Share(cpus=len(os.sched_getaffinity(0)) / count)
        self._executor = RayExecutor(nap, "local", workers=count, share=share)
        wait([self._executor.submit(2.0) for _ in range(2 * count)])  # every process has started

    def submit(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        future: Future[TrialResult] = Future()

        def ended(slept: Future[tuple[float, float]]) -> None:
            self.spans.append(slept.result())
            future.set_result(measured(self._problem, policy, fidelity))

        self._executor.submit(SECONDS).add_done_callback(ended)
        return future

    def close(self) -> None:
        self._executor.close()


class Simulated:
    """Workers in the coordinator's processor time: each takes the next task as soon as it has ended its last one."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.spans: list[tuple[float, float]] = []
        self.slept = 0.0
        self._problem = problem
        self._free = [0.0] * count
        self._ends: dict[Future[TrialResult], tuple[float, TrialResult]] = {}

    def now(self) -> float:
        return time.thread_time() + self.slept

    def sleep_until(self, when: float) -> None:
        self.slept += max(0.0, when - self.now())

    def submit(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        now = self.now()
        result = measured(self._problem, policy, fidelity)
        worker = self._free.index(min(self._free))
        begun = max(now, self._free[worker])
        self._free[worker] = begun + SECONDS
        self.spans.append((begun, begun + SECONDS))
        future: Future[TrialResult] = Future()
        self._ends[future] = (begun + SECONDS, result)
        self.slept -= self.now() - now  # what a worker computes costs the coordinator nothing
        return future

    def wait(self, flights: Collection[Future[TrialResult]], return_when: str) -> tuple[set[Any], set[Any]]:
        """Stands for `concurrent.futures.wait`."""
        self.sleep_until(min(self._ends[f][0] for f in flights))
        now = self.now()
        done = {future for future in flights if self._ends[future][0] <= now}
        for future in done:
            future.set_result(self._ends.pop(future)[1])
        return done, set(flights) - done


class SimulatedAhead:
    """Stands for the process that makes proposals ahead: its processor time passes beside the coordinator's."""

    def __init__(self, workers: Simulated, make: Callable[[int], Any], *, stock: int, rest: int, done: int) -> None:
        self.rest = rest
        self.spent: list[float] = []
        self._workers, self._model, self._stock = workers, make(done), stock
        self._ready: list[tuple[float, Policy]] = []
        self._free = self._told = 0.0

    def propose(self, results: Sequence[TrialResult]) -> Policy:
        workers = self._workers
        for _ in range(self._stock + 1 - len(self._ready)):
            begun = time.thread_time()
            policy = self._model.propose(list(results))
            spent = time.thread_time() - begun
            workers.slept -= spent
            self.spent.append(spent)
            self._free = max(self._free, workers.now()) + spent
            self._ready.append((self._free, policy))
        pickle.dumps(results[int(self._told) :])  # as the coordinator tells its process
        self._told = len(results)
        when, policy = self._ready.pop(0)
        workers.sleep_until(when)
        copied: Policy = pickle.loads(pickle.dumps(policy))
        return copied

    def __enter__(self) -> SimulatedAhead:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def measure(sampler: str, workers: int, trials: int, *, kind: type[Any]) -> tuple[float, float, float]:
    """Returns the busy share, the coordinator's processor time a trial, and that of a proposal made ahead, in ms."""
    problem = problem_of(GROUPS)
    rungs = (RungPlan(Fidelity("screen"), trials), RungPlan(Fidelity("tune", epochs=1.0), 1))
    plan = LadderPlan("busy", problem, rungs, "f", sampler=sampler, workers=workers, tables=TABLES)
    ahead: list[SimulatedAhead] = []
    pool: Any = kind(problem, workers)
    kept = (ladder.Ahead, rung.wait)
    if kind is Simulated:

        def simulated(make: Callable[[int], Any], **options: int) -> SimulatedAhead:
            ahead.append(SimulatedAhead(pool, make, **options))
            return ahead[-1]

        vars(ladder)["Ahead"], vars(rung)["wait"] = simulated, pool.wait
    try:
        with tempfile.TemporaryDirectory() as folder:
            begun = time.thread_time()
            run_ladder(open_storage(Path(folder) / "optuna.db"), plan, submit=pool.submit, identity=lambda p: p.id)
            spent = time.thread_time() - begun
    finally:
        vars(ladder)["Ahead"], vars(rung)["wait"] = kept
        if kind is OnRay:
            pool.close()
    proposals = [second for model in ahead for second in model.spent]
    spans = sorted(pool.spans)[: trials - workers]
    window = (spans[0][0], spans[-1][0])
    busy = sum(min(end, window[1]) - start for start, end in spans)
    share = busy / (workers * (window[1] - window[0]))
    return share, 1e3 * (spent - sum(proposals)) / trials, 1e3 * sum(proposals) / max(len(proposals), 1)


def main() -> None:
    """Measures each sampler and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samplers", nargs="+", default=["random", "nsga2", "tpe", "learned", "auto"])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--real", action="store_true", help="by the clock; needs two cores that do nothing else")
    parser.add_argument("--ray", action="store_true", help="by the clock, on a Ray cluster of this machine")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}, optuna {version('optuna')}"
    kind = OnRay if options.ray else Threads if options.real else Simulated
    how = {OnRay: "by the clock, on Ray", Threads: "by the clock"}.get(kind, "in the coordinator's processor time")
    lines = [
        f"# {options.workers} simulated workers of {SECONDS:.0f}-second trials (`make busy-workers`)",
        "",
        f"{options.trials} trials, {2 * GROUPS + 1} parameters, SQLite, {how}; {machine}.",
        "",
        "| sampler | workers' time busy | coordinator's processor time a trial | of a proposal made ahead |",
        "|---|---|---|---|",
    ]
    for sampler in options.samplers:
        share, spent, ahead = measure(sampler, options.workers, options.trials, kind=kind)
        beside = f"{ahead:.0f} ms, beside it" if ahead else "none"
        lines.append(f"| {sampler} | {share:.1%} | {spent:.0f} ms | {beside} |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
