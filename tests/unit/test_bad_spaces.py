"""A corpus of malformed space files: each is told by line, value and what to do, with status 2."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from autoprune.cli import app

BAD = Path(__file__).parents[1] / "assets/bad"
MESSAGES: dict[str, list[str]] = json.loads((BAD / "messages.json").read_text(encoding="utf-8"))
FILES = sorted((BAD / "spaces").glob("*.yaml"))


def plain(line: str, folder: Path) -> str:
    """Returns a line without the folder and without lists of valid names, which grow."""
    line = line.strip().replace(str(folder.resolve()), "HERE")
    return re.sub(r"(valid:|expected one of) .*?(; got|$)", r"\1 ...\2", line)


def test_the_corpus_holds_a_hundred_files_and_a_message_for_each() -> None:
    assert len(FILES) >= 100
    assert set(MESSAGES) == {file.stem for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_malformed_space_file_is_told_in_words_with_status_2(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["validate", str(file)])
    head, *lines = result.output.splitlines()
    assert result.exit_code == 2
    assert head.startswith(f"autoprune: {file} has {len(lines)} fault")
    assert [plain(line, tmp_path) for line in lines] == MESSAGES[file.stem]
    assert max(map(len, lines)) < 300 + len(str(tmp_path))
    assert "Traceback" not in result.output
    assert list(tmp_path.iterdir()) == [], "nothing that a file says was run"


@pytest.mark.parametrize("name", ["search", "inspect", "latency"])
def test_no_command_runs_what_a_space_file_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, [name, str(BAD / "spaces/model-factory-shell.yaml")])
    assert result.exit_code == 2
    assert "--allow-code" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (".", "the file cannot be read: Is a directory"),
        ("/dev/null", "the file is empty"),
        ("/dev/zero", "larger than 1 MiB"),
        ("absent.yaml", "there is no such file"),
        ("x" * 300, "the file cannot be read: File name too long"),
        ("locked.yaml", "the file cannot be read: Permission denied"),
        ("looping.yaml", "the file cannot be read: Too many levels of symbolic links"),
    ],
)
def test_what_is_no_readable_file_is_told_with_status_2(
    path: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "locked.yaml").touch(mode=0)
    (tmp_path / "looping.yaml").symlink_to("looping.yaml")
    if path == "locked.yaml" and os.access(path, os.R_OK):
        pytest.skip("this user reads everything")
    result = CliRunner().invoke(app, ["validate", path])
    assert result.exit_code == 2
    assert words in result.output
