"""Exports: each format is written whole, read back and compared."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import AutopruneError, CheckpointError, InputError
from autoprune.network.artifacts import export as module
from autoprune.network.artifacts.export import export
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.trace import trace


def factory():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    network = trace(factory().eval(), torch.zeros(2, 3, 8, 8))
    selection = {"0": np.array([0, 2, 5]), "4": np.array([1, 2])}
    small = cut(network, selection)
    save_model(tmp_path / "saved", small, model_document(network, None, selection, {}, {}))
    return tmp_path / "saved", small.eval()


X = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_safetensors_are_copied_and_load_back(saved, tmp_path, output):
    folder, small = saved
    paths = export(folder, tmp_path / "out", format="safetensors", factory=factory)
    assert [p.name for p in paths] == ["model.safetensors", "policy.json"]
    torch.testing.assert_close(output(load(tmp_path / "out", factory), X), output(small, X), atol=1e-5, rtol=1e-4)


def test_a_pt2_program_takes_any_batch_size(saved, tmp_path, output):
    folder, small = saved
    (path,) = export(folder, tmp_path / "out", format="pt2", factory=factory)
    program = torch.export.load(path).module()
    for size in (1, 2, 5):
        torch.testing.assert_close(program(X[:size]), output(small, X[:size]), atol=1e-5, rtol=1e-4)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt2"]


def test_an_onnx_file_takes_any_batch_size(saved, tmp_path, output):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, small = saved
    (path,) = export(folder, tmp_path / "out", format="onnx", factory=factory)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for size in (1, 5):
        (found,) = session.run(None, {"input": X[:size].numpy()})
        np.testing.assert_allclose(found, output(small, X[:size]).numpy(), atol=1e-5, rtol=1e-3)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.onnx"]


def test_an_unknown_format_is_refused_with_the_nearest_name_and_nothing_is_written(saved, tmp_path):
    with pytest.raises(InputError, match="unknown format 'onxx'; did you mean 'onnx'"):
        export(saved[0], tmp_path / "out", format="onxx", factory=factory)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_schema_is_refused(saved, tmp_path):
    document = saved[0] / "policy.json"
    document.write_text(json.dumps({**json.loads(document.read_text()), "schema": 99}))
    with pytest.raises(CheckpointError, match="unknown schema 99"):
        export(saved[0], tmp_path / "out", format="pt2", factory=factory)


def test_an_export_that_gives_another_output_is_an_error(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_like", lambda model, folder: nn.Sequential(model, nn.Softmax(1)))
    with pytest.raises(AutopruneError, match="does not give the model's output"):
        export(saved[0], tmp_path / "out", format="safetensors", factory=factory)
