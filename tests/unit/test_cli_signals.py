"""A command ends in order at the first signal and at once at the second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys, time
import typer
from autoprune.cli import shared

@shared.guarded
def search() -> None:
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("tidying up", flush=True)
        if "stubborn" in sys.argv:
            time.sleep(60)
        raise

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(search)
app([])
"""


def start(*arguments: str, ignored: bool = False) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", "-c", COMMAND, *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) if ignored else None,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "status", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "ended by a signal")]
)
def test_one_signal_lets_it_tidy_up_and_say_how_to_go_on(number: signal.Signals, status: int, word: str) -> None:
    process = start()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, "tidying up\n")
    assert f"autoprune: {word}; the same command resumes where it stopped" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_ends_it_at_once(first: signal.Signals) -> None:
    process = start("stubborn")
    process.send_signal(first)
    assert process.stdout is not None
    assert process.stdout.readline() == "tidying up\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "ended at once" in err
    assert "Traceback" not in err


def test_a_signal_that_it_was_started_to_ignore_stays_ignored() -> None:
    process = start(ignored=True)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (143, "tidying up\n")
