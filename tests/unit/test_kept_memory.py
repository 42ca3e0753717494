"""What a process does with memory that it frees, seen from the system."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from autoprune import cli, memory

glibc = pytest.mark.skipif(
    sys.platform != "linux" or memory._from_libc("mallopt") is None, reason="needs the allocator of glibc"
)
ROUNDS = """
import resource
from autoprune import memory
kept = {call}
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    blocks = [b"x" * {size} for _ in range(3)]
    del blocks
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
HELD = """
from pathlib import Path
from autoprune import memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1])
memory.keep_freed()
before = held()
blocks = [b"x" * {size} for _ in range(10)]
full = held()
del blocks
after = held()
memory.give_back()
print(full - before, after - before, held() - before)
"""
HOLES = """
from pathlib import Path
from autoprune import memory
def held():
    return int(Path("/proc/self/statm").read_text().split()[1])
assert memory.keep_freed()
memory.KEPT = {limit}
blocks = [b"x" * 10_000_000 for _ in range(20)]
del blocks[::2]
before = held()
memory.tidy()
print(before, held())
"""


def printed(program: str, **environment: str) -> list[int]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=own | environment, capture_output=True, text=True, check=True, timeout=60
    )
    return [int(word) for word in done.stdout.split()]


@glibc
@pytest.mark.parametrize("size", [20_000_000, memory.LARGEST - 4096])
def test_what_was_freed_is_used_again_and_not_taken_from_the_system_anew(size: int) -> None:
    _, plain = printed(ROUNDS.format(call="False", size=size))
    kept, pages = printed(ROUNDS.format(call="memory.keep_freed()", size=size))
    assert kept
    assert 4 * pages < plain  # once for ten times


@glibc
def test_what_is_very_large_goes_back_to_the_system() -> None:
    full, after, _ = printed(HELD.format(size=memory.LARGEST + 4096))
    assert after < 0.1 * full


@glibc
def test_what_is_kept_can_be_given_back() -> None:
    full, after, given = printed(HELD.format(size=8_000_000))
    assert after > 0.9 * full
    assert given < 0.1 * full


@glibc
@pytest.mark.parametrize(("limit", "given"), [(50_000_000, True), (500_000_000, False)])
def test_holes_are_given_back_between_evaluations_once_they_are_many(limit: int, given: bool) -> None:
    before, after = printed(HOLES.format(limit=limit))
    assert (after < 0.6 * before) is given


def test_nothing_is_tidied_in_a_process_that_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_lowest", [])
    monkeypatch.setattr(memory, "_from_libc", lambda name: pytest.fail(f"{name} was called"))
    memory.tidy()


@glibc
@pytest.mark.parametrize(
    "chosen", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_settings_that_somebody_made_stand(chosen: dict[str, str]) -> None:
    kept, pages = printed(ROUNDS.format(call="memory.keep_freed()", size=20_000_000), **chosen)
    assert not kept
    assert 4 * pages > printed(ROUNDS.format(call="False", size=20_000_000), **chosen)[1]


def test_a_system_without_such_an_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_from_libc", lambda name: None)
    assert memory.keep_freed({}) is False
    memory.give_back()


def test_an_older_allocator_gets_what_it_admits_and_one_that_refuses_is_not_believed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def old(option: int, value: int) -> int:
        asked.append((option, value))
        return int(option == memory._TRIM_THRESHOLD or value <= 32 << 20)

    monkeypatch.setattr(memory, "_lowest", [])
    monkeypatch.setattr(memory, "_resident", lambda: 1)
    monkeypatch.setattr(memory, "_from_libc", lambda name: old)
    assert memory.keep_freed({})
    assert asked == [(-3, memory.LARGEST), (-3, 32 << 20), (-1, memory.KEPT)]
    monkeypatch.setattr(memory, "_from_libc", lambda name: lambda option, value: 0)
    assert memory.keep_freed({}) is False


def test_the_command_line_keeps_what_it_frees_before_it_does_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(memory, "keep_freed", lambda: done.append("kept"))
    monkeypatch.setattr(cli, "app", lambda prog_name: done.append(prog_name))
    cli.main()
    assert done == ["kept", "autoprune"]
