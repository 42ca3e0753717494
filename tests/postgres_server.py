"""A PostgreSQL server of our own for tests and benchmarks, in a temporary folder, that can be killed and started again.

Needs the server's programs (Debian: `apt-get install postgresql`), no running service. The server refuses to run as
root: then the user `postgres`, or `nobody`, runs it.
"""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any


def programs() -> Path | None:
    """Returns the folder with `initdb` and `postgres`, or None."""
    found = shutil.which("initdb")
    if found:
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[4]))
    return installed[-1].parent if installed else None


class PostgresServer:
    """One server on 127.0.0.1. With `careful=False` it does not wait for the disk, which loses nothing when killed."""

    def __init__(self, *, careful: bool = False) -> None:
        folder = programs()
        if folder is None:
            raise FileNotFoundError("no PostgreSQL server is installed (initdb is nowhere)")
        self._programs = folder
        self._user = _unprivileged() if os.geteuid() == 0 else None
        self.folder = Path(tempfile.mkdtemp(prefix="autoprune-postgres-"))
        if self._user:
            shutil.chown(self.folder, self._user)
        self.folder.chmod(0o755)
        self.port = _free_port()
        self._options = [] if careful else ["-c", "fsync=off", "-c", "full_page_writes=off"]
        self._process: subprocess.Popen[bytes] | None = None
        self._run(
            "initdb", "-D", str(self.folder / "data"), "-U", "autoprune", "-A", "trust", "-E", "UTF8", "--no-sync"
        )
        self.start()

    def url(self, database: str) -> str:
        """Returns the address of a database, which is made where it is missing."""
        import psycopg

        with psycopg.connect(self._dsn, autocommit=True) as connection:
            if not connection.execute("select 1 from pg_database where datname = %s", (database,)).fetchone():
                connection.execute(f'create database "{database}"')  # type: ignore[arg-type]
        return f"postgresql+psycopg://autoprune@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        """Starts the server and waits until it answers."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if self._process is None or self._process.poll() is not None:  # it refuses while old children are there
                self._process = self._launch()
            if self._answers():
                return
            time.sleep(0.05)
        raise TimeoutError((self.folder / "log").read_text()[-2000:])

    def kill(self) -> None:
        """Kills the server as `kill -9` does; its children follow by themselves."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait(30)

    def close(self) -> None:
        """Ends the server and deletes its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)  # its children may need a moment to notice

    @property
    def version(self) -> str:
        return self._run("postgres", "--version").strip()

    @property
    def _dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=autoprune dbname=postgres connect_timeout=5"

    def _answers(self) -> bool:
        import psycopg

        try:
            psycopg.connect(self._dsn).close()
        except psycopg.OperationalError:
            return False
        return True

    def _launch(self) -> subprocess.Popen[bytes]:
        own = ["-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={self.folder}"]
        command = [str(self._programs / "postgres"), "-D", str(self.folder / "data"), "-p", str(self.port), *own]
        with (self.folder / "log").open("ab") as log:
            return subprocess.Popen([*command, *self._options], stdout=log, stderr=log, cwd="/", **self._as_user())

    def _run(self, program: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(self._programs / program), *arguments], capture_output=True, text=True, cwd="/", **self._as_user()
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr or done.stdout}")
        return done.stdout

    def _as_user(self) -> dict[str, Any]:
        return {"user": self._user, "group": pwd.getpwnam(self._user).pw_gid, "extra_groups": []} if self._user else {}


def _unprivileged() -> str:
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
