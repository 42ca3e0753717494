"""The web pages on a finished search: the MLflow UI and the Optuna dashboard, started as a user starts them.

What the pages read is checked through the servers' own interfaces; the pages themselves are opened in a headless
browser where there is one, and their pictures are kept in the folder that `AUTOPRUNE_PICTURES` names.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --hide-scrollbars --force-device-scale-factor=1"
CLOSE_PANEL = """document.querySelector('[data-component-id="mlflow.assistant.chat_panel.close"]')?.click()"""
"""What a person does first in MLflow 3.17, whose assistant covers a quarter of the page."""
PLACE = """element => {
    if (!element || element.disabled) return null;
    element.scrollIntoView({block: 'center'});
    const box = element.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
    return box.width && box.height && element.contains(document.elementFromPoint(x, y)) ? [x, y] : null;
}"""
"""Where a person would click on an element; null where it cannot be clicked now."""
needs_browser = pytest.mark.skipif(not BROWSER, reason="no chromium here")


@pytest.fixture(scope="module")
def finished(searched: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished search: the small one, or that in the folder which `AUTOPRUNE_SEARCHED` names.

    What is picked here must not reach the tests of other files.
    """
    given = os.environ.get("AUTOPRUNE_SEARCHED")
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree((Path(given) if given else searched[0]) / ".autoprune", folder / ".autoprune")
    assert (folder / ".autoprune/optuna.db").is_file()
    return folder


@pytest.fixture(scope="module")
def name(finished: Path, store_of: Any) -> str:
    ((study,),) = store_of(finished).rows(
        "optuna.db", "select min(study_name) from studies where study_name like '%.tune'"
    )
    return str(study).rpartition(".")[0]


@pytest.fixture(scope="module")
def front(finished: Path, name: str, commands: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(commands.run("front", name, "--json", cwd=finished).out)
    return found


@pytest.fixture(scope="module")
def mlflow_ui(finished: Path, tmp_path_factory: pytest.TempPathFactory, await_condition: Any) -> Iterator[str]:
    """The MLflow server with the settings of `mlflow/server.env`, on a free port and this search's store."""
    root = Path(__file__).parents[2]
    settings = dict(
        line.split("=", 1)
        for line in (root / "mlflow/server.env").read_text().splitlines()
        if "=" in line and not line.startswith("#")
    )
    port = free_port()
    settings |= {
        "MLFLOW_PORT": str(port),
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{finished}/.autoprune/mlflow.db",
        "MLFLOW_ARTIFACTS_DESTINATION": str(finished / ".autoprune/artifacts"),
    }
    program = Path(sys.executable).with_name("mlflow")
    folder = tmp_path_factory.mktemp("server")
    yield from served([str(program), "server"], port, folder, await_condition, settings)


@pytest.fixture(scope="module")
def dashboard(finished: Path, await_condition: Any) -> Iterator[str]:
    """The Optuna dashboard as `autoprune dashboard` starts it."""
    port = free_port()
    yield from served(
        [sys.executable, "-m", "autoprune", "dashboard", "--port", str(port)], port, finished, await_condition
    )


def served(
    command: list[str], port: int, folder: Path, await_condition: Any, env: dict[str, str] | None = None
) -> Iterator[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("AUTOPRUNE_", "MLFLOW_"))}
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(
        command, cwd=folder, env=kept | (env or {}), stdout=quiet, stderr=quiet, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert server.poll() is None, f"{command} ended with status {server.returncode}"
        try:
            return bool(get(address))
        except OSError:
            return False

    try:
        assert await_condition(answers, seconds=90)
        yield address
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # it would wait for the browser to hang up
        server.wait(30)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=30) as answer:
        return str(answer.read().decode("utf-8", "replace"))


def ask(address: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.loads(answer.read())


class Browser:
    """A headless browser, spoken to over two pipes in its own debugging protocol."""

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
        self._rest, self._number = b"", 0

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Calls a method and returns its result."""
        self._number += 1
        order: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if session is not None:
            order["sessionId"] = session
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

    def picture(self, address: str, path: Path, *, until: str, size: tuple[int, int] = (1500, 950)) -> Path:
        """Opens a page, waits until a JavaScript condition holds in it, and keeps what it shows."""
        page = self.open(address, until=until, size=size)
        page.keep(path)
        page.close()
        return path

    def open(self, address: str, *, until: str, size: tuple[int, int] = (1500, 950)) -> Page:
        """Opens a page and waits until a JavaScript condition holds in it."""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        screen = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        self.ask("Emulation.setDeviceMetricsOverride", session, **screen)
        self.ask("Page.enable", session)
        self.ask("Page.navigate", session, url=address)
        page = Page(self, target, session, address)
        page.wait(until)
        page.run(CLOSE_PANEL)
        return page

    def close(self) -> None:
        self.ask("Browser.close")
        self._process.wait(30)
        os.close(self._write)
        os.close(self._read)


class Page:
    """A page that is open: what a person does with mouse and keyboard."""

    def __init__(self, browser: Browser, target: str, session: str, address: str) -> None:
        self._browser, self._target, self._session, self._address = browser, target, session, address

    def run(self, script: str) -> Any:
        """Evaluates JavaScript in the page."""
        found = self._browser.ask("Runtime.evaluate", self._session, expression=script, returnByValue=True)
        return found["result"].get("value")

    def wait(self, until: str, seconds: float = 60.0) -> None:
        """Waits until a JavaScript condition holds."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({until})"):
            assert time.monotonic() < end, f"{self._address}: {until} does not come to hold: {self.text()[:2000]}"
            time.sleep(0.2)

    def text(self) -> str:
        """What the page says."""
        return str(self.run("document.body.innerText"))

    def click(self, element: str) -> None:
        """Clicks with the mouse in the middle of the element that a JavaScript expression finds, once it can be hit.

        A dialog grows out of the place that was clicked before: until an element lies still and nothing covers it, a
        click would meet what is behind it.
        """
        end, before, where = time.monotonic() + 60, None, None
        while where is None or where != before:
            assert time.monotonic() < end, f"{self._address}: {element} cannot be clicked: {self.text()[:2000]}"
            time.sleep(0.2)
            before, where = where, self.run(f"({PLACE})({element})")
        for kind in ("mousePressed", "mouseReleased"):
            place = {"x": where[0], "y": where[1], "button": "left", "clickCount": 1}
            self._browser.ask("Input.dispatchMouseEvent", self._session, type=kind, **place)

    def type(self, text: str) -> None:
        """Types into what has the focus."""
        self._browser.ask("Input.insertText", self._session, text=text)

    def enter(self) -> None:
        """Presses Enter."""
        for kind in ("keyDown", "keyUp"):
            key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
            self._browser.ask("Input.dispatchKeyEvent", self._session, type=kind, **key)

    def reload(self, *, until: str) -> None:
        """Opens the page anew and waits until a JavaScript condition holds that did not hold before."""
        self._browser.ask("Page.reload", self._session)
        self.wait(until)
        self.run(CLOSE_PANEL)

    def keep(self, path: Path) -> None:
        """Keeps a picture of what the page shows, once what moves has come to rest."""
        time.sleep(2.0)
        path.write_bytes(base64.b64decode(self._browser.ask("Page.captureScreenshot", self._session)["data"]))

    def close(self) -> None:
        self._browser.ask("Target.closeTarget", targetId=self._target)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("profile"))
    yield running
    running.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(os.environ.get("AUTOPRUNE_PICTURES") or tmp_path_factory.mktemp("pictures"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def runs_of(address: str, name: str, clause: str) -> list[dict[str, Any]]:
    experiment = ask(address, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")["experiment"]
    body = {
        "experiment_ids": [experiment["experiment_id"]],
        "filter": f"tags.`autoprune.search` = '{name}' and {clause}",
        "max_results": 1000,
    }
    return list(ask(address, "/api/2.0/mlflow/runs/search", body).get("runs", []))


def tags_of(run: dict[str, Any]) -> dict[str, str]:
    return {tag["key"]: tag["value"] for tag in run["data"]["tags"]}


def colours(path: Path, box: tuple[float, float, float, float] = (0, 0, 1, 1)) -> int:
    """Returns how many different colours a part of a picture holds: an empty page has a handful."""
    from PIL import Image

    with Image.open(path) as image:
        wide, high = image.size
        part = image.convert("RGB").crop(
            (int(box[0] * wide), int(box[1] * high), int(box[2] * wide), int(box[3] * high))
        )
        return len(part.getcolors(maxcolors=1 << 24) or [])


# --- MLflow ---


def test_the_mlflow_server_shows_the_search_and_marks_its_front(
    mlflow_ui: str, name: str, front: dict[str, Any]
) -> None:
    (search,) = runs_of(mlflow_ui, name, "tags.kind = 'search'")
    metrics = {metric["key"]: metric["value"] for metric in search["data"]["metrics"]}
    assert metrics["hypervolume"] == pytest.approx(front["hypervolume"])
    members = runs_of(mlflow_ui, name, "tags.pareto = 'true'")
    found = sorted(metric["value"] for run in members for metric in run["data"]["metrics"] if metric["key"] == "macs")
    assert found == sorted(point["macs"] for point in front["front"])


def test_the_mlflow_server_hands_out_the_front_and_its_models(mlflow_ui: str, name: str) -> None:
    (search,) = runs_of(mlflow_ui, name, "tags.kind = 'search'")
    listed = ask(mlflow_ui, f"/api/2.0/mlflow/artifacts/list?run_id={search['info']['run_id']}&path=front")["files"]
    assert {file["path"] for file in listed} >= {"front/front.html", "front/front.png", "front/front.csv"}
    page = get(f"{mlflow_ui}/get-artifact?path=front/front.html&run_uuid={search['info']['run_id']}")
    assert "Plotly.newPlot" in page
    for run in runs_of(mlflow_ui, name, "tags.pareto = 'true'"):
        files = ask(mlflow_ui, f"/api/2.0/mlflow/artifacts/list?run_id={run['info']['run_id']}&path=model")["files"]
        assert {"model/model.safetensors", "model/policy.json", "model/MLmodel"} <= {file["path"] for file in files}


def shared_view(experiment: dict[str, Any], *, list_of_runs: bool) -> tuple[str, str]:
    """Returns key and state of a prepared page: the list of runs or the charts."""
    prefix = "mlflow.sharedViewState."
    views = {t["key"].removeprefix(prefix): t["value"] for t in experiment["tags"] if t["key"].startswith(prefix)}
    ((key, state),) = [(key, state) for key, state in views.items() if key.endswith("-list") == list_of_runs]
    return key, state


def chart_page(address: str, name: str) -> str:
    experiment = ask(address, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")["experiment"]
    share = shared_view(experiment, list_of_runs=False)[0]
    number = experiment["experiment_id"]
    return (
        f"{address}/#/experiments/{number}/runs?viewStateShareKey={share}"
        "&compareRunsMode=CHART&workflowType=machine_learning"
    )


def test_the_prepared_chart_page_charts_the_runs_of_the_shown_rung(mlflow_ui: str, name: str) -> None:
    experiment = ask(mlflow_ui, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")["experiment"]
    _, text = shared_view(experiment, list_of_runs=False)
    if text.startswith("deflate;"):
        text = zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))).decode()
    state = json.loads(text)
    assert [chart["type"] for chart in state["compareRunCharts"]] == ["SCATTER", "PARALLEL"]
    shown = runs_of(mlflow_ui, name, state["searchFilter"])
    assert shown
    assert {tags_of(run)["rung"] for run in shown} == {"final"}
    keys = {metric["key"] for run in shown for metric in run["data"]["metrics"]}
    keys |= {param["key"] for run in shown for param in run["data"]["params"]}
    scatter, parallel = state["compareRunCharts"]
    wanted = {scatter["xaxis"]["key"], scatter["yaxis"]["key"]}
    assert wanted | set(parallel["selectedParams"]) | set(parallel["selectedMetrics"]) <= keys


@needs_browser
def test_the_prepared_chart_page_draws_every_trial_in_a_browser(
    mlflow_ui: str, name: str, front: dict[str, Any], browser: Browser, pictures: Path
) -> None:
    points = "document.querySelectorAll('.scatterlayer .point').length"
    until = f"{points} >= {front['trials']} && document.querySelectorAll('.parcoords, canvas').length > 0"
    page = chart_page(mlflow_ui, name)
    path = browser.picture(page, pictures / "mlflow-charts.png", until=until, size=(1500, 1250))
    assert colours(path, (0.35, 0.2, 1, 1)) > 100


@needs_browser
def test_the_searchs_run_shows_the_interactive_front_in_a_browser(
    mlflow_ui: str, name: str, browser: Browser, pictures: Path
) -> None:
    (search,) = runs_of(mlflow_ui, name, "tags.kind = 'search'")
    info = search["info"]
    page = f"{mlflow_ui}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}/artifacts/front/front.html"
    until = "document.querySelector('iframe')"
    path = browser.picture(f"{page}?workflowType=machine_learning", pictures / "mlflow-front.png", until=until)
    assert colours(path, (0.4, 0.3, 1, 1)) > 100


@needs_browser
def test_the_front_opens_as_a_page_of_its_own(finished: Path, name: str, browser: Browser, pictures: Path) -> None:
    (page,) = (finished / f".autoprune/artifacts/{name}").glob("*/artifacts/front/front.html")
    until = "document.querySelectorAll('.scatterlayer .point').length > 3"
    path = browser.picture(page.resolve().as_uri(), pictures / "front-page.png", until=until, size=(1200, 680))
    assert colours(path) > 50


@needs_browser
def test_the_list_of_runs_shows_the_numbers_that_people_need(
    mlflow_ui: str, name: str, front: dict[str, Any], browser: Browser, pictures: Path
) -> None:
    experiment = ask(mlflow_ui, f"/api/2.0/mlflow/experiments/get-by-name?experiment_name={name}")["experiment"]
    share, _ = shared_view(experiment, list_of_runs=True)
    address = f"{mlflow_ui}/#/experiments/{experiment['experiment_id']}/runs?viewStateShareKey={share}"
    until = f"document.body.innerText.includes('{front['trials']} matching runs')"
    page = browser.open(f"{address}&compareRunsMode=TABLE&workflowType=machine_learning", until=until, size=(1700, 800))
    page.wait("document.body.innerText.includes('val_accuracy')")
    text = page.text()
    page.keep(pictures / "mlflow-list.png")
    page.close()
    for column in ("latency_ms", "macs_fraction", "size_bytes", "pareto", "rung"):
        assert column in text


@needs_browser
def test_the_searchs_run_tells_its_front_with_links_and_a_picture(
    mlflow_ui: str, name: str, front: dict[str, Any], browser: Browser, pictures: Path
) -> None:
    (search,) = runs_of(mlflow_ui, name, "tags.kind = 'search'")
    info = search["info"]
    address = f"{mlflow_ui}/#/experiments/{info['experiment_id']}/runs/{info['run_id']}?workflowType=machine_learning"
    page = browser.open(address, until="document.body.innerText.includes('networks on the front')", size=(1500, 1250))
    page.click("[...document.querySelectorAll('button')].find(e => e.innerText.trim() === 'Show more')")
    page.wait(
        "[...document.images].some(e => e.src.includes('path=front/front.png') && e.complete && e.naturalWidth > 100)"
    )
    linked = page.run("[...document.querySelectorAll('table a')].map(e => e.innerText.trim())")
    page.keep(pictures / "mlflow-search.png")
    page.close()
    assert {str(point["trial"]) for point in front["front"]} <= set(linked)


# --- picking ---

DIALOG = "document.querySelector('[role=dialog]')"
SAVE = """document.querySelector('[data-component-id="mlflow.edit-aliases-modal.save-button"]')"""


def row_of(version: str) -> str:
    """Returns the JavaScript expression of a version's row on the registered model's page."""
    return (
        f"""[...document.querySelectorAll('[role=row]')].find(e => e.querySelector('a[href$="/versions/{version}"]'))"""
    )


def pick_by_clicking(page: Page, version: str, picture: Path) -> None:
    """Does on the registered model's page what a person does: the pencil beside the aliases, `picked`, Enter, Save."""
    page.click(f"{row_of(version)}?.querySelector('[data-component-id*=modelversiontablealiasescell]')")
    page.wait(f"{DIALOG}?.innerText.includes('alias for model version {version}')")
    page.click(f"{DIALOG}?.querySelector('input[role=combobox]')")
    page.wait(f"document.activeElement === {DIALOG}.querySelector('input[role=combobox]')")
    page.type("picked")
    page.wait(f"{DIALOG}.querySelector('input[role=combobox]').value === 'picked'")
    page.enter()
    page.wait(f"{DIALOG}.querySelector('[role=status][title=picked]')")
    page.keep(picture)
    page.click(SAVE)
    page.wait(f"!{DIALOG}")  # it closes when the server has answered; a refusal is shown in it
    page.reload(until=f"/@\\s*picked/.test({row_of(version)}?.innerText)")  # 3.17 does not draw the new alias itself


@pytest.fixture
def made(finished: Path, tmp_path: Path) -> Any:
    """Runs `make` as a user does, in a folder with the Makefile and an environment in which all is installed."""
    root = Path(__file__).parents[2]
    for file in ("Makefile", "pyproject.toml"):
        shutil.copy(root / file, tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").symlink_to(Path(sys.executable).parent)
    (tmp_path / ".venv/.installed").touch()
    foreign = ("AUTOPRUNE_", "MLFLOW_", "FORCE_COLOR", "MAKE", "MFLAGS")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    kept |= {"PYTHONPATH": str(root), "AUTOPRUNE_HOME": str(finished / ".autoprune"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = ["make", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=kept | env, capture_output=True, text=True, check=False)

    return run


@needs_browser
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_version_that_is_picked_by_clicking_is_the_model_that_make_exports(
    mlflow_ui: str, name: str, made: Any, browser: Browser, pictures: Path, tmp_path: Path
) -> None:
    query = f"/api/2.0/mlflow/model-versions/search?filter=name%3D'autoprune-{name}'"
    versions = {version["version"]: version for version in ask(mlflow_ui, query)["model_versions"]}
    first, last = min(versions, key=int), max(versions, key=int)
    assert first != last
    done = made("export", f"NAME={name}", MLFLOW_TRACKING_URI=mlflow_ui)
    assert done.returncode == 2
    assert f"no model of {name} is picked: set the alias `picked` on a version in the MLflow UI" in done.stderr
    assert not (tmp_path / "exports").exists()

    address = f"{mlflow_ui}/#/models/autoprune-{name}?workflowType=machine_learning"
    page = browser.open(address, until=row_of(last), size=(1300, 950))
    written = []
    for number in (first, last):  # the second is a change of mind
        pick_by_clicking(page, number, pictures / f"mlflow-pick-{number}.png")
        alias = ask(mlflow_ui, f"/api/2.0/mlflow/registered-models/alias?name=autoprune-{name}&alias=picked")
        assert alias["model_version"]["version"] == number
        page.keep(pictures / f"mlflow-picked-{number}.png")

        done = made("export", f"NAME={name}", MLFLOW_TRACKING_URI=mlflow_ui)
        assert done.returncode == 0, done.stderr
        (trial,) = [tag["value"] for tag in versions[number]["tags"] if tag["key"] == "trial"]
        target = tmp_path / f"exports/{name}-{trial}"
        assert f"exports/{name}-{trial}/model.safetensors" in done.stdout.splitlines()
        for file in ("model.safetensors", "policy.json"):
            link = f"{mlflow_ui}/get-artifact?path=model/{file}&run_uuid={versions[number]['run_id']}"
            with urllib.request.urlopen(link, timeout=30) as answer:
                assert (target / file).read_bytes() == answer.read(), (number, file)
        written.append((target / "model.safetensors").read_bytes())
    page.close()
    assert written[0] != written[1]
    assert len(list((tmp_path / "exports").iterdir())) == 2


# --- the Optuna dashboard ---


def studies_of(address: str) -> dict[str, int]:
    found = ask(address, "/api/studies")
    return {study["study_name"]: study["study_id"] for study in found["study_summaries"]}


def test_the_optuna_dashboard_knows_every_rung_by_readable_names(dashboard: str, name: str) -> None:
    studies = studies_of(dashboard)
    assert {f"{name}.{rung}" for rung in ("screen", "tune", "final", "controls")} <= set(studies)
    detail = ask(dashboard, f"/api/studies/{studies[f'{name}.tune']}?after=0")
    assert detail["objective_names"][0] == "val_error"
    assert detail["objective_names"][1].endswith("_fraction")
    assert detail["directions"] == ["minimize", "minimize"]
    assert all(trial["state"] == "Complete" for trial in detail["trials"])
    assert all(value <= 0 for trial in detail["trials"] for value in trial["constraints"])
    assert all(trial["constraints"] for trial in detail["trials"])
    assert all(re.match(r"(ratio|criterion|target)/", p["name"]) for t in detail["trials"] for p in t["params"])


def test_the_optuna_dashboard_shows_the_front_among_its_best_trials(
    dashboard: str, name: str, front: dict[str, Any]
) -> None:
    detail = ask(dashboard, f"/api/studies/{studies_of(dashboard)[f'{name}.final']}?after=0")
    best = {trial["number"] for trial in detail["best_trials"]}
    points = {tuple(t["values"]) for t in detail["trials"] if t["number"] in best}
    expected = {(1 - p["val_accuracy"], p["macs_fraction"]) for p in front["front"]}
    assert {tuple(round(v, 9) for v in point) for point in points} >= {tuple(round(v, 9) for v in e) for e in expected}


def test_every_trial_links_to_a_run_that_the_mlflow_server_has(dashboard: str, mlflow_ui: str, name: str) -> None:
    studies = studies_of(dashboard)
    for rung in ("tune", "final"):
        for trial in ask(dashboard, f"/api/studies/{studies[f'{name}.{rung}']}?after=0")["trials"]:
            assert "channels kept" in trial["note"]["body"]
            match = re.search(r"\[MLflow run\]\(.*/runs/([0-9a-f]{32})", trial["note"]["body"])
            assert match, trial["note"]
            run = ask(mlflow_ui, f"/api/2.0/mlflow/runs/get?run_id={match[1]}")["run"]
            assert tags_of(run)["autoprune.trial"] == f"{name}.{rung}/{trial['number']}"


def test_every_rung_says_what_it_is_for_and_shows_the_front(dashboard: str, name: str, front: dict[str, Any]) -> None:
    for rung in ("screen", "tune", "final", "controls"):
        note = ask(dashboard, f"/api/studies/{studies_of(dashboard)[f'{name}.{rung}']}?after=0")["note"]["body"]
        assert f"rung `{rung}` of screen → tune → final" in note
        assert all(f"| {point['trial']} |" in note for point in front["front"])


@needs_browser
@pytest.mark.parametrize(
    ("page", "until"),
    [
        ("/note", "document.body.innerText.includes('Objectives')"),
        ("", "document.querySelectorAll('.scatterlayer .point').length > 4"),
        ("/analytics", "document.querySelectorAll('.scatterlayer .point').length > 4"),
        ("/trials", "document.body.innerText.includes('MLflow run')"),
    ],
)
def test_the_optuna_dashboard_opens_in_a_browser(
    page: str, until: str, dashboard: str, name: str, browser: Browser, pictures: Path
) -> None:
    study = studies_of(dashboard)[f"{name}.tune"]
    address = f"{dashboard}/dashboard/studies/{study}{page}"
    file = f"optuna{page.replace('/', '-') or '-front'}.png"
    path = browser.picture(address, pictures / file, until=until, size=(1500, 1250))
    assert colours(path, (0.2, 0.1, 1, 1)) > 50
