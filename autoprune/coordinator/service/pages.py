"""The status page of a service: on this machine alone, and for reading only.

Decides the addresses: `/` for people, `/status.json` for programs, `/health` for a watchdog. A request that names
another host is refused, so that no web site reads the page through a visitor's browser.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from autoprune import report
from autoprune.coordinator.commands.queueing import status_of
from autoprune.coordinator.service.supervising import HEALTHY
from autoprune.errors import AutopruneError

_FRESH_SECONDS = 2.0
_HOSTS = ("127.0.0.1", "localhost")


@contextmanager
def open_page(home: Path, port: int) -> Iterator[str]:
    """Serves the status page of a home folder while the block runs; yields its address."""
    source = _Source(home)

    class Handler(_Handler):
        status = source

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="status-page", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Source:
    """The status, read at most every other second however many people look."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._read = float("-inf")
        self._data: dict[str, Any] = {}

    def __call__(self) -> dict[str, Any]:
        with self._lock:
            if time.monotonic() - self._read >= _FRESH_SECONDS:
                self._data = status_of(self._home)
                self._read = time.monotonic()
            return self._data


class _Handler(BaseHTTPRequestHandler):
    status: _Source
    server_version = "autoprune"
    sys_version = ""

    def do_GET(self) -> None:
        """Answers a request."""
        if self.headers.get("Host", "").rpartition(":")[0] not in _HOSTS and self.headers.get("Host") not in _HOSTS:
            self._answer(403, "this page is for 127.0.0.1 alone\n", "text/plain")
            return
        path = self.path.partition("?")[0]
        if path not in ("/", "/status.json", "/health"):
            self._answer(404, "there are / and /status.json and /health\n", "text/plain")
            return
        try:
            data = self.status()
        except AutopruneError as error:
            self._answer(503, f"{error}\n", "text/plain")
            return
        if path == "/":
            self._answer(200, report.status_page(data), "text/html")
        elif path == "/status.json":
            self._answer(200, json.dumps(data, indent=1) + "\n", "application/json")
        else:
            services = (data["service"] or {"services": []})["services"]
            ill = [row["name"] for row in services if row["state"] != HEALTHY]
            self._answer(503 if ill else 200, f"not healthy: {', '.join(ill)}\n" if ill else "healthy\n", "text/plain")

    def _answer(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Cache-Control": "no-store",
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
            "X-Content-Type-Options": "nosniff",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps requests off the terminal."""
