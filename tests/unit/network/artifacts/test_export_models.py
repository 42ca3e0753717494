"""Exports of models that are not one image in and one tensor out, and what happens where a file cannot be made."""

import copy
import errno
import json

import numpy as np
import pytest
import torch
from torch import nn

from autoprune.errors import AutopruneError, CheckpointError, InputError
from autoprune.network.artifacts import export as module
from autoprune.network.artifacts.export import export, inputs_of
from autoprune.network.artifacts.saved import load, model_document, save_model
from autoprune.network.surgery.cut import cut
from autoprune.network.tracing.counting import count_params
from autoprune.network.tracing.trace import trace

FORMATS = ("safetensors", "pt2", "onnx")


class Tagger(nn.Module):
    """Token ids and a weight for each of them in, a dict out; holds a buffer, and a parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.inner = nn.Linear(8, 12)
        self.outer = nn.Linear(12, 5)
        self.aside = nn.Linear(3, 3)
        self.register_buffer("shift", torch.linspace(0, 1, 5))

    def forward(self, ids, weights):
        hidden = torch.relu(self.inner(self.table(ids) * weights.unsqueeze(-1)))
        return {"logits": self.outer(hidden.mean(1)) + self.shift, "states": (hidden, ids)}


def save(folder, factory, inputs, dtype=None):
    torch.manual_seed(0)
    model = factory().eval()
    if dtype is not None:
        model, inputs = model.to(dtype), tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    network = trace(model, inputs)
    selection = {group.name: np.arange(group.size // 2) for group in network.groups}
    small = cut(network, selection)
    save_model(folder, small, model_document(network, None, selection, {}, {}))
    return small.eval()


TOKENS = (torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0)), torch.ones(2, 7))


@pytest.fixture
def tagger(tmp_path):
    return tmp_path / "saved", save(tmp_path / "saved", Tagger, TOKENS)


def test_a_model_of_token_ids_and_weights_comes_back_as_a_program_with_its_dict(tagger, tmp_path):
    folder, small = tagger
    (path,) = export(folder, tmp_path / "out", format="pt2", factory=Tagger)
    program = torch.export.load(path).module()
    for batch in (1, 4):
        x = (torch.randint(0, 11, (batch, 7)), torch.rand(batch, 7))
        found, expected = program(*x), small(*x)
        assert found.keys() == expected.keys()
        torch.testing.assert_close(found["logits"], expected["logits"])
        torch.testing.assert_close(found["states"], expected["states"])


def test_an_onnx_file_calls_inputs_and_outputs_as_the_model_does(tagger, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    folder, small = tagger
    (path,) = export(folder, tmp_path / "out", format="onnx", factory=Tagger)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [entry.name for entry in session.get_inputs()] == ["ids", "weights"]
    assert [entry.name for entry in session.get_outputs()] == ["logits", "states_0", "ids"]
    x = (torch.randint(0, 11, (3, 7)), torch.rand(3, 7))
    found = session.run(["logits"], {"ids": x[0].numpy(), "weights": x[1].numpy()})[0]
    np.testing.assert_allclose(found, small(*x)["logits"].detach().numpy(), atol=1e-5)
    stored = {t.name: int(np.prod(t.dims)) for t in onnx.load(str(path)).graph.initializer}
    owned = sum(stored.get(name, 0) for name, _ in small.named_parameters())
    assert owned == count_params(small) - count_params(small.aside)  # what is never read has no place in a graph


def image_factory():
    pool = nn.AdaptiveAvgPool2d(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 4)
    )


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_in_bfloat16_is_exported_with_its_weights(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    small = save(tmp_path / "saved", image_factory, (torch.zeros(2, 3, 6, 6),), dtype=torch.bfloat16)
    paths = export(tmp_path / "saved", tmp_path / "out", format=format, factory=image_factory)
    loaded = load(tmp_path / "saved", image_factory)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    x = torch.rand(3, 3, 6, 6)
    expected = small(x.bfloat16()).float()
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(paths[0]), providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    elif format == "pt2":
        found = torch.export.load(paths[0]).module()(x.bfloat16()).float()
    else:
        found = load(tmp_path / "out", image_factory)(x.bfloat16()).float()
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


class Fixed(nn.Module):
    """A model that wrote its batch down."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

    def forward(self, x):
        return self.body(x.view(2, 6))


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_a_model_with_a_fixed_batch_is_refused_with_advice_and_leaves_nothing(format, tmp_path):
    if format == "onnx":
        pytest.importorskip("onnxruntime")
    save(tmp_path / "saved", Fixed, (torch.zeros(2, 6),))
    with pytest.raises(InputError, match="Fixed cannot be exported with a dynamic batch"):
        export(tmp_path / "saved", tmp_path / "out", format=format, factory=Fixed)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


@pytest.mark.parametrize("format", ["safetensors", "pt2"])
def test_a_full_disk_is_one_error_and_leaves_nothing(format, tagger, tmp_path, monkeypatch):
    def full(path, data):
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    with pytest.raises(InputError, match=r"cannot be written to .*out: No space left on device"):
        export(tagger[0], tmp_path / "out", format=format, factory=Tagger)
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_a_target_that_is_a_file_or_lies_in_one_is_refused(tagger, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "out"):
        with pytest.raises(InputError, match="the model cannot be written to"):
            export(tagger[0], target, format="safetensors", factory=Tagger)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "saved"]


def test_an_export_that_fails_its_check_keeps_the_file_that_was_there(tagger, tmp_path, monkeypatch):
    (path,) = export(tagger[0], tmp_path / "out", format="pt2", factory=Tagger)
    before = path.read_bytes()
    monkeypatch.setattr(module, "count_params", lambda model: 7)
    with pytest.raises(AutopruneError, match="parameters, the model 7"):
        export(tagger[0], tmp_path / "out", format="pt2", factory=Tagger)
    assert path.read_bytes() == before
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.pt2"]


def test_exporting_from_a_folder_that_was_moved_works(tagger, tmp_path, output):
    folder, small = tagger
    moved = folder.rename(tmp_path / "elsewhere")
    x = (torch.zeros(2, 7, dtype=torch.long), torch.ones(2, 7))
    torch.testing.assert_close(output(load(moved, Tagger), *x)["logits"], output(small, *x)["logits"])
    assert load(moved / "model.safetensors", Tagger).table.embedding_dim == 4


@pytest.mark.parametrize(
    ("factory", "error", "said"),
    [
        (image_factory, CheckpointError, "does not belong to Sequential"),
        (Tagger(), InputError, "factory is a function that builds the dense model, got Tagger"),
        (lambda: None, InputError, "must return the dense torch.nn.Module, and returned NoneType"),
    ],
)
def test_a_wrong_factory_is_told_apart(factory, error, said, tagger):
    with pytest.raises(error, match=said):
        load(tagger[0], factory)


def test_a_factory_of_another_width_is_refused_although_every_tensor_would_fit(tagger):
    class Wider(Tagger):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(8, 16), nn.Linear(16, 5)

    with pytest.raises(CheckpointError, match=r"was pruned from a Wider of .* parameters, and this one has"):
        load(tagger[0], Wider)


def test_missing_and_damaged_files_are_told_by_name(tagger, tmp_path):
    folder, _ = tagger
    with pytest.raises(CheckpointError, match=r"no pruned model at .*nowhere"):
        load(tmp_path / "nowhere", Tagger)
    weights, document = folder / "model.safetensors", folder / "policy.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="not a safetensors file that can be read"):
        load(folder, Tagger)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*model.safetensors"):
        load(folder, Tagger)
    document.write_text(document.read_text()[:40])
    with pytest.raises(CheckpointError, match=r"policy.json cannot be read"):
        load(folder, Tagger)


def test_documents_without_inputs_stand_for_one_image_and_damaged_ones_are_refused(tagger):
    assert inputs_of({"input_shape": [3, 8, 8]}).sample(2)[0].shape == (2, 3, 8, 8)
    document = json.loads((tagger[0] / "policy.json").read_text())
    ids, weights = inputs_of(document).sample(3)
    assert (ids.dtype, weights.dtype) == (torch.int64, torch.float32)
    assert 0 <= int(ids.min()) <= int(ids.max()) <= int(TOKENS[0].max())
    for damaged in ({}, {"inputs": [{"dtype": "float32"}]}, {"inputs": [{"shape": [3], "dtype": "float99"}]}):
        with pytest.raises(CheckpointError, match="does not say what inputs"):
            inputs_of(damaged)


def test_the_model_is_left_in_its_own_mode_and_type_by_an_export(tagger, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    folder, small = tagger
    before = copy.deepcopy(small.state_dict())
    export(folder, tmp_path / "out", format="onnx", factory=Tagger)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
