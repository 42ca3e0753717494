"""How the tracking server is started: its command, its settings, and who may reach it.

Decides the settings that hold (the environment's before those of `mlflow/server.env`), refuses an interface that other
machines reach unless people must log in, and says where searches record. Starts nothing, and must not import mlflow:
settings cost nothing.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from autoprune.errors import InputError, MissingExtraError
from autoprune.tracking.connection import connect, translated
from autoprune.tracking.location import resolve_uri, server_settings, sqlite_path

AUTH = "AUTOPRUNE_MLFLOW_AUTH"
"""Setting that names MLflow's app for logins: `basic-auth`."""
_NEEDED = {
    "MLFLOW_FLASK_SERVER_SECRET_KEY": "a long random text that signs sessions",
    "MLFLOW_AUTH_ADMIN_PASSWORD": "the password of the user `admin`",
}
_DEFAULTS = {
    "MLFLOW_HOST": "127.0.0.1",
    "MLFLOW_PORT": "5000",
    "MLFLOW_WORKERS": "1",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_START = (
    "import os, sys; from autoprune.tracking import prepare_store;"
    " prepare_store(os.environ['MLFLOW_BACKEND_STORE_URI']); os.execvp(sys.argv[1], sys.argv[1:])"
)
"""Makes the tables of a new SQLite file as a search does, whole or not at all: both may begin at the same time."""


@dataclass(frozen=True)
class ServerPlan:
    """How to run the tracking server, and where it and its records are.

    `recording` is what goes into the environment of searches: they write to a SQLite file themselves, so that they need
    no server, and to any other store through the server, which knows where artifacts go.
    """

    command: tuple[str, ...]
    env: Mapping[str, str]
    host: str
    port: int
    recording: Mapping[str, str]

    @property
    def address(self) -> str:
        """Where this machine finds its pages."""
        return local_address(self.host, self.port)


def server_plan(home: Path, env: Mapping[str, str], *, directory: Path | None = None) -> ServerPlan:
    """Returns how to run the tracking server of a home folder.

    Args:
        home: The folder that holds the state of searches.
        env: The environment; what it sets wins over `mlflow/server.env`.
        directory: Where `mlflow/server.env` is looked for; by default the working directory.

    Raises:
        InputError: The port is none, the login app is unknown, other machines could reach the server without a login,
            or its checks of host and origin are turned off.
        MissingExtraError: Logins are asked for and the package that they need is not installed.
        TrackingError: `mlflow/server.env` cannot be read.
    """
    directory = (directory or Path.cwd()).resolve()
    settings = {**_DEFAULTS, **server_settings(directory), **env}
    host, port = settings["MLFLOW_HOST"].strip(), _port(settings["MLFLOW_PORT"])
    login = _login(settings)
    if not is_loopback(host) and not login:
        raise InputError(
            f"MLFLOW_HOST={host} would let other machines in without a login: set {AUTH}=basic-auth with"
            f" {' and '.join(_NEEDED)} in the environment, or keep 127.0.0.1 and use an SSH tunnel"
        )
    if settings.get("MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE", "").strip().lower() in ("true", "1"):
        raise InputError(
            "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE turns off MLflow's checks of host and origin, and any web page"
            " could then use the server: take it out, and name hosts in MLFLOW_SERVER_ALLOWED_HOSTS"
        )
    direct = {name: value for name, value in settings.items() if name != "MLFLOW_TRACKING_URI"}
    uri = resolve_uri(home, {"MLFLOW_TRACKING_URI": settings.get("MLFLOW_BACKEND_STORE_URI", "")}, directory=directory)
    artifacts = settings.get("MLFLOW_ARTIFACTS_DESTINATION") or str(_artifacts(uri, home))
    direct |= {"MLFLOW_BACKEND_STORE_URI": uri, "MLFLOW_ARTIFACTS_DESTINATION": _absolute(artifacts, directory)}
    beside = Path(sys.executable).with_name("mlflow")
    program = [str(beside) if beside.is_file() else "mlflow", "server"]
    command = [sys.executable, "-P", "-c", _START, *program, *(["--app-name", login] if login else [])]
    address = local_address(host, port)
    recording = {"MLFLOW_TRACKING_URI": uri if sqlite_path(uri) is not None else address, "AUTOPRUNE_MLFLOW": address}
    if login:
        recording |= _credentials(settings)
    return ServerPlan(tuple(command), direct, host, port, recording)


def prepare_store(uri: str) -> None:
    """Makes the tables of a SQLite store that does not exist yet; any other store is left to MLflow.

    Raises:
        TrackingError: The store cannot be made.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        with translated("make", uri):
            connect(uri)


def is_loopback(host: str) -> bool:
    """Whether an interface is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def local_address(host: str, port: int) -> str:
    """Returns the address at which this machine finds a server that listens on `host`."""
    shown = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}"


def _login(settings: Mapping[str, str]) -> str:
    """Returns MLflow's app for logins, or nothing, and checks that it can work."""
    login = settings.get(AUTH, "").strip()
    if not login:
        return ""
    if login != "basic-auth":
        raise InputError(f"{AUTH}={login} is unknown; valid: basic-auth")
    if missing := [f"{name} ({what})" for name, what in _NEEDED.items() if not settings.get(name, "").strip()]:
        raise InputError(f"{AUTH}=basic-auth needs {' and '.join(missing)} in the environment")
    if importlib.util.find_spec("flask_wtf") is None:
        raise MissingExtraError(f"{AUTH}=basic-auth needs a package that is not installed; pip install 'mlflow[auth]'")
    return login


def _credentials(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns what a search logs in with: what the environment says, or the administrator."""
    return {
        "MLFLOW_TRACKING_USERNAME": settings.get("MLFLOW_TRACKING_USERNAME", "admin"),
        "MLFLOW_TRACKING_PASSWORD": settings.get("MLFLOW_TRACKING_PASSWORD", settings["MLFLOW_AUTH_ADMIN_PASSWORD"]),
    }


def _port(text: str) -> int:
    if not text.strip().isdecimal() or not 1 <= int(text) <= 65535:
        raise InputError(f"MLFLOW_PORT={text} is no port: write a number from 1 to 65535")
    return int(text)


def _artifacts(uri: str, home: Path) -> Path:
    path = sqlite_path(uri)
    return (path.parent if path is not None else home.resolve()) / "artifacts"


def _absolute(place: str, directory: Path) -> str:
    return place if "://" in place or place.startswith(("s3:", "gs:")) else str(directory / place)
