"""The report in a real browser: no network, no errors, nothing wider than the screen, axes with names.

The pictures are kept in the folder that `AUTOPRUNE_PICTURES` names.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FLAGS = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
FLAGS += " --disable-component-update --hide-scrollbars --force-device-scale-factor=1"
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium here")

AXES = """[...document.querySelectorAll('.figure')].map(box => [box.id, box.querySelectorAll('.xtitle').length,
  box.querySelectorAll('.ytitle').length])"""
TOO_WIDE = """[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, pre, svg') &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1).map(e => e.tagName + '.' + e.className)"""


class Page:
    """One page of a headless browser, spoken to over two pipes in its own debugging protocol."""

    def __init__(self, profile: Path) -> None:
        theirs_in, self._write = os.pipe()
        self._read, theirs_out = os.pipe()
        low, high = (fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in (theirs_in, theirs_out))

        def place_pipes() -> None:
            os.dup2(low, 3)
            os.dup2(high, 4)

        command = [BROWSER, *FLAGS.split(), "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(
            command, stdout=quiet, stderr=quiet, pass_fds=(3, 4), preexec_fn=place_pipes, start_new_session=True
        )
        for fd in (theirs_in, theirs_out, low, high):
            os.close(fd)
        self._rest, self._number, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """Calls a method and returns its result; keeps what the page reports meanwhile."""
        self._number += 1
        order: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            order["sessionId"] = self._session
        os.write(self._write, json.dumps(order).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                data = os.read(self._read, 1 << 20)
                assert data, "the browser has ended"
                self._rest += data
            line, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            if "method" in answer:
                self.events.append(answer)

    def value(self, expression: str) -> Any:
        """Returns what a JavaScript expression gives."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def open(self, path: Path, *, width: int, scheme: str) -> None:
        """Opens a file on a screen of a width and a colour scheme, and waits until its figures are drawn."""
        self.events.clear()
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.ask("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + 60
        while not self.value("Boolean(document.documentElement.dataset.drawn)"):
            assert time.monotonic() < end, [e for e in self.events if e["method"].startswith(("Runtime.ex", "Log"))]
            time.sleep(0.2)
        time.sleep(1.0)

    def errors(self) -> list[Any]:
        """Returns the errors that the page has reported."""
        wrong = [e["params"] for e in self.events if e["method"] == "Runtime.exceptionThrown"]
        wrong += [e["params"] for e in self.events if e["method"] == "Log.entryAdded"]
        said = [e["params"] for e in self.events if e["method"] == "Runtime.consoleAPICalled"]
        return wrong + [s for s in said if s["type"] in ("error", "warning")]

    def requests(self) -> list[str]:
        """Returns what the page has asked for besides itself."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if not url.startswith(("file:", "data:", "blob:"))]

    def picture(self, path: Path) -> None:
        """Keeps a picture of the whole page."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self, path: Path) -> None:
        """Prints the page into a PDF file."""
        path.write_bytes(base64.b64decode(self.ask("Page.printToPDF", printBackground=True)["data"]))

    def close(self) -> None:
        self._session = ""
        self.ask("Browser.close")
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    running = Page(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, commands: Any, request: pytest.FixtureRequest) -> Path:
    """The report of a small search, or the file that `AUTOPRUNE_REPORT` names."""
    given = os.environ.get("AUTOPRUNE_REPORT")
    if given:
        return Path(given)
    searched = request.getfixturevalue("searched")[0]
    path = tmp_path_factory.mktemp("report") / "report.html"
    done = commands.run("report", "quick", "--output", path, cwd=searched)
    assert done.status == 0, done.err
    assert done.out.strip() == str(path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("AUTOPRUNE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_the_report_is_readable_without_network_or_errors(
    page: Page, written: Path, pictures: Path, width: int, scheme: str
) -> None:
    page.open(written, width=width, scheme=scheme)
    page.picture(pictures / f"report-{width}-{scheme}.png")
    assert page.errors() == []
    assert page.requests() == []
    assert page.value("document.documentElement.scrollWidth") <= width
    assert page.value(TOO_WIDE) == []
    axes = page.value(AXES)
    assert {"figure-front", "figure-widths", "figure-sensitivity"} <= {name for name, _, _ in axes}
    assert all(x == 1 and y == 1 for _, x, y in axes), axes
    background = page.value("getComputedStyle(document.body).backgroundColor")
    ink = page.value("getComputedStyle(document.querySelector('#figure-front .xtitle')).fill")
    bright = sum(int(n) for n in background.strip("rgb()").split(",")) > 380
    assert bright == (scheme == "light")
    assert (sum(int(n) for n in ink.strip("rgb()").split(",")) > 380) == (scheme == "dark")


@needs_browser
def test_the_report_can_be_printed(page: Page, written: Path, pictures: Path) -> None:
    page.open(written, width=1200, scheme="dark")
    path = pictures / "report.pdf"
    page.printed(path)
    assert path.read_bytes().startswith(b"%PDF")
    assert page.errors() == []
