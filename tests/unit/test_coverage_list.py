"""The coverage benchmark: its list names what it promises, and its table tells successes, failures and reasons."""

import importlib.util
import sys
from pathlib import Path

import pytest

from autoprune.network.models.building import model_names
from autoprune.network.models.zoo import ZOO

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The benchmark's modules that need no model: the runner and the table."""
    found = {}
    for name in ("coverage_table", "coverage"):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        found[name] = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = found[name]
        spec.loader.exec_module(found[name])
    return found


def test_the_list_names_every_builder_of_torchvision_and_a_hundred_models_of_timm(modules):
    models = modules["coverage"].read_list(BENCHMARKS / "coverage_models.txt")
    names = {library: [m.name for m in models if m.library == library] for library in ("torchvision", "timm")}
    assert sorted(names["torchvision"]) == sorted(set(model_names()) - set(ZOO))
    assert len(names["timm"]) == len(set(names["timm"])) == 100
    assert len(models) == 180
    assert all(32 <= m.pixels <= 256 for m in models)


GOOD = {
    "params": 1_300_000, "groups": 36, "frozen": 2, "runs": True, "macs_kept": 0.4998, "twin": 4e-7,
    "costs_exact": True, "reload": 0.0, "onnx": "equal", "seconds": 8.9, "peak_mib": 523, "step": "done",
    "reasons": {"the model's output": 1, "a single channel": 1},
}  # fmt: skip


def rendered(modules, **rows):
    document = {"environment": {"torch": "2"}, "rows": {f"timm/{k}": {"pixels": 64, **v} for k, v in rows.items()}}
    return modules["coverage_table"].render(document, 180)


def line(text, name):
    return next(line for line in text.splitlines() if line.startswith(f"| {name} |"))


def test_a_row_tells_each_check_and_what_stays(modules):
    peer = {"runs": False, "failure": "ZeroDivisionError: modulo by zero"}
    row = line(rendered(modules, good={"autoprune": GOOD, "torch_pruning": peer}), "good")
    assert "| 36 | 2 | 0.50 | 4e-07 | exact | equal | equal | 8.9 | 523 | fails |" in row
    assert "1 x a single channel; Torch-Pruning: ZeroDivisionError: modulo by zero" in row


def test_totals_count_what_was_reached_and_failures_are_told(modules):
    wrong = {
        **GOOD,
        "twin": 0.3,
        "costs_exact": False,
        "reload": 0.5,
        "onnx": "OnnxExporterError: no",
        "macs_kept": 0.7,
    }
    crashed = {"failure": "time limit (300 s) during tracing"}
    text = rendered(modules, good={"autoprune": GOOD}, wrong={"autoprune": wrong}, crashed={"autoprune": crashed})
    for title, count in {
        "models": 3, "exported and pruned": 2, "halved: at most 52 % of the MACs, and it runs": 1,
        "equal to the masked twin": 1, "MACs, parameters, bytes exact": 1, "reload equal": 1, "ONNX equal": 1,
    }.items():  # fmt: skip
        assert f"| {title} | {count} |" in text
    assert "WRONG | DIFFERS | fails" in line(text, "wrong")
    assert "**time limit (300 s) during tracing**" in line(text, "crashed")


def test_a_network_of_approximate_groups_alone_is_marked_and_not_called_equal(modules):
    rough = {**GOOD, "twin": None, "approximate": "the LayerNorm … averages", "approximate_groups": 36}
    text = rendered(modules, rough={"autoprune": rough})
    assert "| equal to the masked twin | 0 |" in text
    assert "| ≈ " in line(text, "rough")
    assert "≈ 36 groups: the LayerNorm … averages" in line(text, "rough")


def test_only_what_failed_or_is_missing_is_run_again(modules):
    class Options:
        retry, skip_onnx, skip_torch_pruning = True, False, False

    missing, peer = modules["coverage"].missing, {"runs": True}
    assert missing({"autoprune": GOOD, "torch_pruning": peer}, Options) == []
    assert missing({"autoprune": {**GOOD, "twin": 0.3}, "torch_pruning": peer}, Options) == ["autoprune"]
    assert missing({"autoprune": {**GOOD, "macs_kept": 0.8}}, Options) == ["autoprune", "torch_pruning"]
    Options.retry = False
    assert missing({"autoprune": {**GOOD, "twin": 0.3}, "torch_pruning": peer}, Options) == []
    assert missing({}, Options) == ["autoprune", "torch_pruning"]
