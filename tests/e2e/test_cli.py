"""The command line as a user meets it: a subprocess, its output and its exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ASSETS = ROOT / "tests/assets"
HEAVY = {"torch", "torchvision", "optuna", "mlflow", "pandas", "numpy", "pydantic", "yaml", "rich"}

# Stands in for `autoprune.coordinator`, whose functions take minutes: it prints what it was called with.
COORDINATOR = """
import signal, sys, time, types
from autoprune import errors
fake = types.ModuleType("autoprune.coordinator")

class Outcome:
    text = "the front"

def run_search(space, *, home, workers, timeout, trials, summary):
    fail = space.model.arguments.get("fail")
    if fail == "slow":
        print("started", flush=True)
        time.sleep(30)
    if fail:
        raise getattr(errors, fail, RuntimeError)("what went wrong")
    print(f"{space.name} home={home} workers={workers} timeout={timeout} trials={trials} summary={summary}")
    return Outcome

fake.run_search = run_search
fake.OnRay = lambda *place: f"ray{place}"
fake.show_front = lambda name, *, home, layers: (f"{name} {home} {layers}", {"name": name, "error": float("nan")})
fake.inspect_space = lambda space, *, home: (f"groups of {space.name}", {"groups": [1, float("inf")]})
fake.ExportWish = lambda *wish: " ".join(map(str, wish))
fake.export_models = lambda wish, *, home, say: [wish, "policy.json"]
fake.dashboard_command = lambda home, port: ["echo", str(home), str(port)] if port != 1 else ["no-such-dashboard"]
sys.modules["autoprune.coordinator"] = fake
signal.signal(signal.SIGINT, signal.default_int_handler)
from autoprune.cli import main
main()
"""

COMMANDS = ("inspect", "validate", "search", "front", "export", "schema", "dashboard")
COMMANDS += ("pick", "finetune", "reproduce", "sync")


def run(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the real command line."""
    command = [sys.executable, "-W", "error", "-m", "autoprune", *arguments]
    return subprocess.run(command, cwd=cwd, env=clean(env), capture_output=True, text=True, check=False, timeout=60)


def run_composed(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command line with a coordinator that only says what it was asked for."""
    command = [sys.executable, "-W", "error", "-c", COORDINATOR, *arguments]
    return subprocess.run(command, cwd=cwd, env=clean(env), capture_output=True, text=True, check=False, timeout=60)


def clean(env: dict[str, str] | None) -> dict[str, str]:
    # MAKE*: the tests may themselves run under make, and a make below it tells which folder it enters.
    foreign = ("AUTOPRUNE_", "MLFLOW_", "FORCE_COLOR", "MAKE", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    return kept | {"COLUMNS": "120", "NO_COLOR": "1"} | (env or {})


def space_file(folder: Path, text: str = "") -> str:
    path = folder / "space.yaml"
    path.write_text("schema: 1\nname: t\nmodel: {name: resnet20}\ndata: {name: digits}\n" + text)
    return path.name


def test_help_lists_the_commands_without_importing_anything_heavy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "autoprune", "--help"],
        cwd=tmp_path,
        env=clean(None),
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "autoprune" in imported
    assert not imported & HEAVY
    for command in COMMANDS:
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = run(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"Usage: autoprune {command}" in done.stdout


def test_the_version_is_the_packages(tmp_path: Path) -> None:
    import autoprune

    done = run("--version", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, f"autoprune {autoprune.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        ["serch"],
        ["search", "--trials", "0"],
        ["search", "--trials", "many"],
        ["search", "--workers", "0"],
        ["search", "--timeout", "soon"],
        ["search", "--timeout", "-5"],
        ["front"],
        ["export"],
        ["pick", "t"],
        ["pick", "t", "--knee", "--trial", "3"],
        ["pick", "t", "--min-accuracy", "90"],
        ["finetune", "t"],
        ["export", "t", "--trial", "-1"],
        ["dashboard", "--port", "70000"],
        ["validate", "--unknown"],
    ],
    ids=" ".join,
)
def test_a_wrong_invocation_has_status_2_and_no_traceback(arguments: list[str], tmp_path: Path) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_validate_without_a_file_takes_the_embedded_default(tmp_path: Path) -> None:
    done = run("validate", cwd=tmp_path)
    assert done.returncode == 0
    assert "valid; search digits-resnet20, 40 candidates, screen -> tune -> final" in done.stdout


def test_validate_reports_all_faults_on_stderr_and_writes_nothing(tmp_path: Path) -> None:
    done = run("validate", str(ASSETS / "bad/many_faults.yaml"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "10 faults:" in done.stderr
    assert "  line 16: criteria.choices[1]: unknown value 'tailor'; did you mean 'taylor'?" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_validate_names_missing_files_with_their_line(tmp_path: Path) -> None:
    done = run("validate", space_file(tmp_path, "checkpoint: ${DIR:-here}/a.pt\n"), cwd=tmp_path, env={"DIR": "there"})
    assert done.returncode == 2
    assert "line 5: checkpoint: there is no file 'there/a.pt'" in done.stderr


def test_validate_accepts_overrides(tmp_path: Path) -> None:
    path = space_file(tmp_path)
    assert (
        run("validate", path, "--set", "name=other", "--set", "seed=3", cwd=tmp_path).stdout.count("search other") == 1
    )
    done = run("validate", path, "--set", "seed=-3", cwd=tmp_path)
    assert done.returncode == 2
    assert "seed: must be at least 0, got -3 (from --set)" in done.stderr


def test_schema_prints_json(tmp_path: Path) -> None:
    done = run("schema", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads(done.stdout)["title"] == "autoprune space file"


def test_search_hands_its_options_to_the_coordinator(tmp_path: Path) -> None:
    options = ["--trials", "5", "--workers", "3", "--timeout", "2h", "--home", "h", "--name", "mine", "--summary"]
    done = run_composed("search", space_file(tmp_path), *options, cwd=tmp_path)
    assert done.stdout.splitlines() == ["mine home=h workers=3 timeout=7200.0 trials=5 summary=True", "the front"]
    assert (done.returncode, done.stderr) == (0, "")


def test_search_without_options_uses_the_spaces_and_the_machines(tmp_path: Path) -> None:
    done = run_composed("search", cwd=tmp_path, env={"AUTOPRUNE_HOME": "elsewhere"})
    assert done.stdout.startswith("digits-resnet20 home=elsewhere workers=")
    assert "timeout=None trials=None summary=False" in done.stdout
    on_gpu = run_composed("search", space_file(tmp_path, "device: cuda\n"), cwd=tmp_path)
    assert on_gpu.stdout.startswith("t home=.autoprune workers=None ")


def test_search_hands_the_cluster_to_the_coordinator(tmp_path: Path) -> None:
    options = ["--ray", "ray://head:10001", "--workers", "8", "--gpus-per-trial", "0.5"]
    done = run_composed("search", space_file(tmp_path), *options, cwd=tmp_path)
    assert "workers=ray('ray://head:10001', 8, 1.0, 0.5) " in done.stdout
    alone = run_composed("search", space_file(tmp_path), "--gpus-per-trial", "0.5", cwd=tmp_path)
    assert alone.returncode == 2
    assert "belong to --ray" in alone.stderr


def test_a_name_that_looks_like_yaml_is_taken_as_it_is(tmp_path: Path) -> None:
    assert run_composed("search", space_file(tmp_path), "--name", "007", cwd=tmp_path).stdout.startswith("007 home")
    done = run_composed("search", space_file(tmp_path), "--name", "Not [a] name", cwd=tmp_path)
    assert done.returncode == 2
    assert "lower-case letters" in done.stderr


@pytest.mark.parametrize(
    ("error", "status"),
    [("StudyError", 2), ("BudgetError", 2), ("MissingExtraError", 2), ("TrackingError", 3), ("TrialError", 1)],
)
def test_a_known_error_is_a_line_on_stderr_and_its_status(error: str, status: int, tmp_path: Path) -> None:
    done = run_composed("search", space_file(tmp_path), "--set", f"model.arguments.fail={error}", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "autoprune: what went wrong\n")


def test_a_bug_keeps_its_traceback_and_has_status_1(tmp_path: Path) -> None:
    done = run_composed("search", space_file(tmp_path), "--set", "model.arguments.fail=bug", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RuntimeError: what went wrong" in done.stderr


def test_ctrl_c_has_status_130_and_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", COORDINATOR, "search", space_file(tmp_path), "--set", "model.arguments.fail=slow"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=clean(None), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 130
    assert stderr.strip() == "autoprune: interrupted; the same command resumes where it stopped"


def test_front_and_inspect_print_text_or_json_without_nan(tmp_path: Path) -> None:
    assert run_composed("front", "t", "--layers", "17", cwd=tmp_path).stdout == "t .autoprune 17\n"
    assert json.loads(run_composed("front", "t", "--json", cwd=tmp_path).stdout) == {"name": "t", "error": None}
    path = space_file(tmp_path)
    assert run_composed("inspect", path, cwd=tmp_path).stdout == "groups of t\n"
    assert json.loads(run_composed("inspect", path, "--json", cwd=tmp_path).stdout) == {"groups": [1, None]}


def test_a_reader_that_closes_early_is_no_error(tmp_path: Path) -> None:
    script = f"{sys.executable} -m autoprune schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=clean(None), capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_export_prints_what_it_wrote_and_refuses_an_unknown_format(tmp_path: Path) -> None:
    done = run_composed("export", "t", "--trial", "17", "--format", "onnx", "--output", "o", cwd=tmp_path)
    assert done.stdout.splitlines() == ["t 17 ('onnx',) o False False", "policy.json"]
    done = run_composed("export", "t@knee", "--format", "all", "--evaluate", cwd=tmp_path)
    assert done.stdout.splitlines()[0] == "t@knee None ('safetensors', 'pt2', 'onnx') None True False"
    done = run_composed("export", "t", "--trial", "17", "--format", "onx", cwd=tmp_path)
    assert done.returncode == 2
    assert "unknown format 'onx'; did you mean 'onnx'?" in done.stderr


def test_dashboard_becomes_the_command_that_the_coordinator_names(tmp_path: Path) -> None:
    done = run_composed("dashboard", "--port", "9000", "--home", "h", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "h 9000\n")
    assert "http://127.0.0.1:9000" in done.stderr
    done = run_composed("dashboard", "--port", "1", cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-dashboard is not installed" in done.stderr


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
class TestMake:
    """The Makefile is the index of everything that can be run."""

    @staticmethod
    def dry(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Says what a target would run; `.venv` counts as made."""
        command = ["make", "-n", "-o", ".venv/.installed", *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=clean(env), capture_output=True, text=True, check=False, timeout=60
        )

    def test_help_is_the_default_and_lists_every_target(self) -> None:
        done = subprocess.run(["make"], cwd=ROOT, env=clean(None), capture_output=True, text=True, check=True)
        listed = {line.split()[1] for line in done.stdout.splitlines()}
        text = (ROOT / "Makefile").read_text()
        assert listed == set(re.findall(r"^([a-z][a-z-]*):(?!=)", text, re.MULTILINE))
        database = subprocess.run(
            ["make", "-pn", "help"], cwd=ROOT, env=clean(None), capture_output=True, text=True, check=True
        )
        phony = next(line for line in database.stdout.splitlines() if line.startswith(".PHONY:"))
        assert set(phony.split()[1:]) == listed

    def test_search_passes_its_variables_on(self) -> None:
        line = self.dry("search", "SPACE=a.yaml", "TRIALS=60", "WORKERS=2", "HOURS=1.5", "NAME=n").stdout.split()
        assert line[0] == "OMP_WAIT_POLICY=PASSIVE"
        assert (
            line[1:]
            == textwrap.dedent(
                """.venv/bin/autoprune search a.yaml --trials 60 --workers 2 --timeout 1.5h --name n"""
            ).split()
        )
        assert self.dry("search").stdout.split() == ["OMP_WAIT_POLICY=PASSIVE", ".venv/bin/autoprune", "search"]

    def test_front_without_a_name_shows_the_default_search(self) -> None:
        assert self.dry("front").stdout.split() == [".venv/bin/autoprune", "front", "digits-resnet20"]
        assert self.dry("front", "NAME=x").stdout.split()[-1] == "x"

    def test_export_takes_the_picked_model_where_no_trial_is_named(self) -> None:
        done = self.dry("export", "NAME=x", "TRIAL=17", "FORMAT=onnx")
        assert done.stdout.split()[1:] == ["export", "x", "--trial", "17", "--format", "onnx"]
        assert self.dry("export", "NAME=x").stdout.split()[1:] == ["export", "x", "--format", "safetensors"]

    def test_pick_finetune_and_sync_pass_their_variables_on(self) -> None:
        assert self.dry("pick", "NAME=x", "PICK=--max-macs 0.5").stdout.split()[1:] == [
            "pick",
            "x",
            "--max-macs",
            "0.5",
        ]
        assert self.dry("pick").stdout.split()[1:] == ["pick", "digits-resnet20", "--knee"]
        done = self.dry("finetune", "NAME=x@knee", "EPOCHS=3")
        assert done.stdout.split()[2:] == ["finetune", "x@knee", "--epochs", "3"]
        assert self.dry("sync", "NAME=x").stdout.split()[1:] == ["sync", "x"]

    def test_reproduce_needs_a_run(self) -> None:
        done = self.dry("reproduce", "RUN=0123")
        assert done.stdout.split()[1:] == [".venv/bin/autoprune", "reproduce", "0123"]
        done = self.dry("reproduce")
        assert done.returncode == 2
        assert "make reproduce RUN=id" in done.stderr

    def test_a_failed_installation_leaves_no_stamp_and_is_tried_again(self, tmp_path: Path) -> None:
        shutil.copy(ROOT / "Makefile", tmp_path)
        (tmp_path / "pyproject.toml").touch()
        python = tmp_path / "python"  # `-m venv` succeeds and gives a Python whose pip fails
        python.write_text("#!/bin/sh\nmkdir -p .venv/bin && cp no-pip .venv/bin/python\n")
        (tmp_path / "no-pip").write_text("#!/bin/sh\necho pip was asked >&2\nexit 1\n")
        for script in (python, tmp_path / "no-pip"):
            script.chmod(0o755)
        for _ in range(2):
            done = subprocess.run(
                ["make", "validate", "PYTHON=./python"],
                cwd=tmp_path,
                env=clean(None),
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 2
            assert "pip was asked" in done.stderr
            assert not (tmp_path / ".venv/.installed").exists()

    def test_each_target_is_one_line(self) -> None:
        lines = (ROOT / "Makefile").read_text().splitlines()
        for above, line, below in zip(lines, lines[1:], [*lines[2:], ""], strict=False):
            if line.startswith("\t"):
                assert not above.startswith("\t"), above
                assert not below.startswith("\t"), below
