"""What a run was made with: versions, git commit, machine.

Decides which of these are worth a tag. Must not import the packages that it reports on.
"""

from __future__ import annotations

import getpass
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("autoprune", "torch", "torchvision", "optuna", "mlflow")
_GIT_SECONDS = 10


def environment_tags(directory: Path | None = None) -> dict[str, str]:
    """Returns tags that say which code, packages and machine make the runs.

    `git_commit` and `git_dirty` are those of the repository that holds `directory` (by default the working directory);
    where there is no repository, or no git, both are left out.
    """
    tags = {f"version.{name}": version for name in PACKAGES if (version := _version(name))}
    tags["version.python"] = platform.python_version()
    tags["platform"] = platform.platform()
    tags["mlflow.source.name"] = "autoprune"
    tags["mlflow.source.type"] = "LOCAL"
    user = _user()
    if user:
        tags["mlflow.user"] = user
    commit = _git(["rev-parse", "HEAD"], directory)
    if commit:
        tags["git_commit"] = tags["mlflow.source.git.commit"] = commit
        changed = _git(["status", "--porcelain", "--untracked-files=no"], directory)
        if changed is not None:
            tags["git_dirty"] = "true" if changed else "false"
    return tags


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container whose user id has no name
        return None


def _git(arguments: list[str], directory: Path | None) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
