"""How busy one coordinator keeps many workers: `make busy-workers`.

64 simulated workers (threads that sleep for a second a trial) are fed by the product's own ladder, with its proposals,
its SQLite storage and a stored trial for each; the machine's cores are all the coordinator's. Printed is the share of
their time that the workers were busy, from the first start to the last result, without the last `workers` trials, for
which there is nothing more to start.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from storage_cost import problem_of

from autoprune.policy import Policy
from autoprune.results import Fidelity, Problem, TrialResult
from autoprune.search import open_storage
from autoprune.search.ladder import LadderPlan, RungPlan, run_ladder

SECONDS = 1.0


class Workers:
    """A pool whose tasks take `SECONDS` each, and a record of when they ran."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.spans: list[tuple[float, float]] = []
        self._problem = problem
        self._pool = ThreadPoolExecutor(count)
        self._lock = threading.Lock()

    def submit(self, policy: Policy, fidelity: Fidelity) -> Future[TrialResult]:
        """Asks for an evaluation that takes its time and says that wide networks are accurate."""
        return self._pool.submit(self._evaluate, policy, fidelity)

    def _evaluate(self, policy: Policy, fidelity: Fidelity) -> TrialResult:
        begun = time.monotonic()
        time.sleep(SECONDS)
        widths = policy.widths(self._problem.groups)
        kept = sum((1 + i) * w for i, w in enumerate(widths.values())) / (64 * 78)
        metrics = {"val_accuracy": kept, "val_loss": 1 - kept}
        with self._lock:
            self.spans.append((begun, time.monotonic()))
        return TrialResult(policy, policy.id, fidelity, widths, self._problem.costs(policy), metrics)


def measure(sampler: str, workers: int, trials: int) -> tuple[float, float]:
    """Returns the busy share and the coordinator's processor time a trial, in milliseconds."""
    problem = problem_of(12)
    pool = Workers(problem, workers)
    rungs = (RungPlan(Fidelity("screen"), trials), RungPlan(Fidelity("tune", epochs=1.0), 1))
    plan = LadderPlan("busy", problem, rungs, "f", sampler=sampler, workers=workers)
    with tempfile.TemporaryDirectory() as folder:
        begun = time.process_time()
        run_ladder(open_storage(Path(folder) / "optuna.db"), plan, submit=pool.submit, identity=lambda p: p.id)
        spent = 1e3 * (time.process_time() - begun) / trials
    spans = sorted(pool.spans)[: trials - workers]
    window = (spans[0][0], spans[-1][0])
    busy = sum(min(end, window[1]) - start for start, end in spans)
    return busy / (workers * (window[1] - window[0])), spent


def main() -> None:
    """Measures each sampler and writes the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--samplers", nargs="+", default=["random", "nsga2", "tpe"])
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    machine = f"{platform.machine()}, Python {platform.python_version()}, optuna {version('optuna')}"
    lines = [
        f"# {options.workers} simulated workers of {SECONDS:.0f}-second trials (`make busy-workers`)",
        "",
        f"{options.trials} trials, 25 parameters, SQLite; {machine}.",
        "",
        "| sampler | workers' time busy | coordinator's processor time a trial |",
        "|---|---|---|",
    ]
    for sampler in options.samplers:
        share, spent = measure(sampler, options.workers, options.trials)
        lines.append(f"| {sampler} | {share:.1%} | {spent:.0f} ms |")
        print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
