"""The benchmark: every contender on the same network, data, images, recipe and wall-clock, over several seeds.

    python tests/benchmarks/bench/run.py [--quick] [--networks resnet20 resnet56] [--seeds 3] [--jobs 2]

`make bench` and `make bench-quick` call it. Peers get an environment of their own (a folder of packages beside the
results, filled by pip on first use). What is finished already is not repeated. It writes tables and plots under
tests/benchmarks/results/.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
WORK = Path(".autoprune/bench")
PEERS = {
    "Torch-Pruning": ["torch-pruning==1.6.1"],
    "ModelOpt": [
        "nvidia-modelopt==0.47.0",
        "torchprofile<0.1",
        "omegaconf",
        "antlr4-python3-runtime==4.9.*",
        "pulp<4",
        "nvidia-ml-py",
        "regex",
        "huggingface_hub",
        "hf-xet",
        "requests",
        "filelock",
        "fsspec",
        "tqdm",
    ],
}
QUICK = ("autoprune", "Torch-Pruning, uniform", "Torch-Pruning, global", "plain Optuna")
FULL = (
    *QUICK,
    "ModelOpt FastNAS",
    "autoprune, 75 s",
    "autoprune without learned weights",
    "autoprune, warm starts alone",
)
ABLATION = ("autoprune, sampler alone", "autoprune, NSGA-II", "autoprune, random", "autoprune, one rung")


def slug(name: str) -> str:
    """Returns a contender's folder name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-").replace("--", "-")


def environment(contender: str) -> dict[str, str]:
    """Returns the environment of a contender's process; a peer's packages are installed on first use."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parents[2]), env.get("PYTHONPATH")]))
    peer = next((peer for peer in PEERS if contender.startswith(peer)), None)
    if peer is not None:
        folder = WORK / "peers" / slug(peer)
        if not (folder / ".installed").is_file():
            command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *PEERS[peer]]
            subprocess.run(command, check=True)
            (folder / ".installed").touch()
        env["PYTHONPATH"] += os.pathsep + str(folder.resolve())
    return env


def run(contender: str, network: str, seed: int, options: argparse.Namespace) -> str:
    """Runs one contender and finishes its picks; returns a line of progress."""
    folder = WORK / options.tag / network / f"seed{seed}" / slug(contender)
    common = ["--network", network, "--seed", str(seed), "--folder", str(folder), "--cache", str(WORK / "cache")]
    begun = time.monotonic()
    steps = []
    if not (folder / "run.json").is_file():
        steps.append(["contenders.py", contender, *common, "--seconds", str(options.seconds)])
    steps.append(["finish.py", *common, "--epochs", str(options.epochs)])
    for step in steps:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{step[0]}.log").open("w", encoding="utf-8") as log:
            command = [sys.executable, str(HERE / step[0]), *step[1:]]
            try:
                done = subprocess.run(
                    command, env=environment(contender), stdout=log, stderr=log, timeout=options.limit, check=False
                )
            except subprocess.TimeoutExpired:
                return f"{network} seed {seed} {contender}: {step[0]} took more than {options.limit:.0f} s"
        if done.returncode:
            return f"{network} seed {seed} {contender}: {step[0]} failed, see {folder / (step[0] + '.log')}"
    return f"{network} seed {seed} {contender}: {time.monotonic() - begun:.0f} s"


def main() -> None:
    """Runs the benchmark and renders its results."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="ResNet-20, one seed, fewer contenders, short searches")
    parser.add_argument("--ablation", action="store_true", help="also the ablations of the sampler")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--contenders", nargs="+", help="only these, by name; what others have finished is kept")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=240.0, help="time of a search (resnet56: three times as much)")
    parser.add_argument("--epochs", type=float, default=0.5, help="fine-tuning of every pick")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--limit", type=float, default=7200.0, help="seconds after which a contender is given up")
    options = parser.parse_args()
    options.tag = "quick" if options.quick else "full"
    contenders = list(QUICK if options.quick else FULL) + list(ABLATION if options.ablation else ())
    unknown = set(options.contenders or ()) - {*FULL, *ABLATION}
    if unknown:
        raise SystemExit(f"unknown contenders {sorted(unknown)}; there are {[*FULL, *ABLATION]}")
    contenders = options.contenders or contenders
    if options.quick:
        options.networks, options.seeds = ["resnet20"], 1
        options.seconds, options.epochs = min(options.seconds, 150.0), min(options.epochs, 0.1)
    if "AUTOPRUNE_DATA" not in os.environ:
        raise SystemExit("AUTOPRUNE_DATA must name the folder with cifar10-jpeg.tar.xz and the weights")
    from render import render

    for network in options.networks:
        for contender in contenders:
            environment(contender)  # packages first, not while another contender is timed
        (WORK / "cache").mkdir(parents=True, exist_ok=True)
        prepare = f"import sys; sys.path.insert(0, {str(HERE)!r}); import common, pathlib; "
        prepare += f"common.task_of({network!r}, seed=0, cache=pathlib.Path({str(WORK / 'cache')!r}))"
        subprocess.run([sys.executable, "-c", prepare], env=environment(""), check=True)
        for seed in range(options.seeds):
            timed = argparse.Namespace(**{**vars(options), "seconds": options.seconds * (3 if "56" in network else 1)})
            with ThreadPoolExecutor(options.jobs) as pool:
                for line in pool.map(lambda name, s=seed, n=network, o=timed: run(name, n, s, o), contenders):
                    print(line, flush=True)
            render(WORK / options.tag, options)
    print((HERE.parent / "results" / f"bench-{options.tag}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
