"""Settings of all tests, and the PostgreSQL server that some of them share."""

from __future__ import annotations

import importlib.util
import os
import signal
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# No deadline: the machine's cores may be shared, and a slow example is no failure.
settings.register_profile("autoprune", deadline=None)
settings.load_profile("autoprune")

# A job in the background of a shell is started with interrupts ignored, which the processes that tests interrupt would
# inherit.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def postgres_module() -> Any:
    """The module `tests/postgres_server.py`; the test folders are no packages."""
    spec = importlib.util.spec_from_file_location("postgres_server", Path(__file__).with_name("postgres_server.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def postgres_server(postgres_module: Any) -> Iterator[Any]:
    """A server of our own, which a test may kill and start."""
    if postgres_module.programs() is None:
        pytest.skip("no PostgreSQL server is installed (Debian: apt-get install postgresql)")
    pytest.importorskip("psycopg", reason="the extra autoprune[postgres] is not installed")
    server = postgres_module.PostgresServer()
    yield server
    server.close()


@pytest.fixture
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The address of a database for studies: `AUTOPRUNE_TEST_POSTGRES`, or an empty one on a server of our own."""
    named = os.environ.get("AUTOPRUNE_TEST_POSTGRES")
    if named:
        return named
    url_of: Callable[[str], str] = request.getfixturevalue("postgres_server").url
    return url_of(f"studies_{uuid.uuid4().hex[:8]}")
