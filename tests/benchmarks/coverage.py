"""Runs on which model? Every model of a list through autoprune, and through Torch-Pruning beside it; one table.

    python tests/benchmarks/coverage.py [--models GLOB] [--resume] [--retry] [--skip-onnx] [--skip-torch-pruning]

Each attempt is a process of its own, with one thread and limits of processor time and memory: a crash or a hang is a
row too. Rows are written as they come to `results/coverage.json` and `results/coverage.md`. `--resume` runs only what
is missing there, `--retry` only our own attempts that are missing or did not reach half of the MACs.
Decides what is run and in which order. What is tried on a model is in `coverage_attempts.py`, how a row reads in
`coverage_table.py`.
"""

from __future__ import annotations

import argparse
import fcntl
import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PEER = "torch-pruning==1.6.1"
PATIENCE = 4
"""Wall time may exceed the limit of processor time by this factor, for a busy machine."""


@dataclass(frozen=True)
class Model:
    """A line of the list: who builds it, its name, and the side of its square input in pixels."""

    library: str
    name: str
    pixels: int

    @property
    def key(self) -> str:
        """How results name it."""
        return f"{self.library}/{self.name}"


def read_list(path: Path) -> list[Model]:
    """Returns the models of the list, in its order."""
    lines = [line.split("#")[0].split() for line in path.read_text(encoding="utf-8").splitlines()]
    return [Model(library, name, int(pixels)) for library, name, pixels in filter(None, lines)]


def install_peer(folder: Path) -> Path:
    """Returns a folder that holds Torch-Pruning and nothing else; the attempt's process alone imports from it."""
    if not (folder / "torch_pruning").is_dir():
        subprocess.run(
            [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), PEER], check=True
        )
    return folder


def attempt(function: str, model: Model, options: dict[str, Any], limit: int, gib: float) -> dict[str, Any]:
    """Runs `coverage_attempts.<function>` in a process of its own; returns what it wrote, and how it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["coverage_attempts"])
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "row.json"
        process = context.Process(target=_child, args=(function, asdict(model), options, str(target), (limit, gib)))
        process.start()
        process.join(PATIENCE * limit)
        late = process.is_alive()
        if late:
            process.kill()
            process.join()
        row = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
    code = process.exitcode
    if late or code == -signal.SIGXCPU:
        row["failure"] = f"time limit ({limit} s) during {row.get('step', 'the import')}"
    elif code:
        name = f"signal {-code}" if code < 0 else f"exit status {code}"
        row["failure"] = f"{name} during {row.get('step', 'the import')}"
    return row


def _child(
    function: str, model: dict[str, Any], options: dict[str, Any], target: str, limits: tuple[int, float]
) -> None:
    seconds, gib = limits
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]  # of this process, which cannot be raised again
    space = int(gib * 2**30) if most == resource.RLIM_INFINITY else min(int(gib * 2**30), most)
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    import coverage_attempts

    path = Path(target)
    row: dict[str, Any] = {}

    def write(**values: Any) -> None:
        row.update(values)
        usage = resource.getrusage(resource.RUSAGE_SELF)
        row["seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
        row["peak_mib"] = usage.ru_maxrss // 1024
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(row), encoding="utf-8")
        os.replace(temporary, path)

    getattr(coverage_attempts, function)(Model(**model), options, write)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """Refuses to run beside another coverage run: two large models at a time would not fit into the memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"another coverage run holds {path}")
        yield


def sound(ours: dict[str, Any]) -> bool:
    """Whether an attempt of ours ended with everything equal."""
    twin = ours.get("twin")
    equal = ours.get("reload", 1) <= 1e-5 and (twin is None or twin <= 1e-4) and ours.get("onnx", "equal") == "equal"
    return bool(ours.get("costs_exact")) and equal and ours.get("step") == "done"


def missing(row: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """Returns the attempts that a row lacks."""
    wanted = []
    ours = row.get("autoprune")
    again = ours is not None and options.retry and (ours.get("macs_kept", 1) > 0.52 or not sound(ours))
    if ours is None or again or ("onnx" not in ours and ours.get("runs") and not options.skip_onnx):
        wanted.append("autoprune")
    if "torch_pruning" not in row and not options.skip_torch_pruning:
        wanted.append("torch_pruning")
    return wanted


def main() -> None:
    """Runs the list and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--list", type=Path, default=HERE / "coverage_models.txt", help="lines `library name pixels`")
    parser.add_argument("--models", default="*", help="run only these, a glob on library/name or on the name")
    parser.add_argument("--resume", action="store_true", help="run only what the results lack")
    parser.add_argument("--retry", action="store_true", help="like --resume, and our own attempts that failed again")
    parser.add_argument("--skip-onnx", action="store_true")
    parser.add_argument("--skip-torch-pruning", action="store_true")
    parser.add_argument("--limit", type=int, default=300, help="seconds of processor time an attempt")
    parser.add_argument("--memory", type=float, default=9, help="GiB of address space an attempt")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--peer", type=Path, default=Path(".autoprune/torch-pruning"))
    options = parser.parse_args()
    from coverage_table import environment, render

    models = read_list(options.list)
    chosen = [m for m in models if any(fnmatch.fnmatchcase(text, options.models) for text in (m.key, m.name))]
    if not chosen:
        sys.exit(f"no model of {options.list} matches {options.models!r}")
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", MKL_NUM_THREADS="1")
    # The server that attempts are forked from imports everything once; it finds modules by the environment alone.
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    peer = None if options.skip_torch_pruning else str(install_peer(options.peer.resolve()))
    settings = {"onnx": not options.skip_onnx, "peer": peer}
    path = options.results / "coverage.json"
    with alone(options.results / ".lock"):
        rows: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else {}
        for number, model in enumerate(chosen, 1):
            known = rows.get(model.key, {}) if options.resume or options.retry else {}
            row = {**rows.get(model.key, {}), "pixels": model.pixels}
            for function in missing(known, options):
                row[function] = attempt(function, model, settings, options.limit, options.memory)
                shown = {k: v for k, v in row[function].items() if k not in ("reasons", "step")}
                print(f"[{number}/{len(chosen)}] {model.key} {function}: {shown}", flush=True)
                rows[model.key] = row
                ordered = {m.key: rows[m.key] for m in models if m.key in rows} | rows
                document = {"schema": 1, "environment": environment(), "rows": ordered}
                path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                (options.results / "coverage.md").write_text(render(document, len(models)), encoding="utf-8")
    print((options.results / "coverage.md").read_text(encoding="utf-8").split("\n## ")[0])


if __name__ == "__main__":
    main()
