"""Reading and writing weights."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.errors import CheckpointError
from autoprune.network.models.building import build_model
from autoprune.network.models.checkpoints import file_digest, load_checkpoint, read_metadata, save_state

DATA = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).parents[5] / "shared" / "data"))


def make(seed=0):
    return build_model(name="resnet20", arguments={"in_channels": 1}, seed=seed)


def same(first, second):
    pairs = zip(first.state_dict().items(), second.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_saved_weights_load_back_with_their_metadata(tmp_path):
    path = tmp_path / "folder" / "weights.safetensors"
    save_state(make(1), path, {"note": "first"})
    model = make(2)
    load_checkpoint(model, path)
    assert same(model, make(1))
    assert read_metadata(path) == {"note": "first"}
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_wrapped_and_prefixed_state_dicts_are_unwrapped(tmp_path, key, prefix):
    state = {prefix + name: value for name, value in make(1).state_dict().items()}
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "w.pt")
    model = make(2)
    load_checkpoint(model, tmp_path / "w.pt")
    assert same(model, make(1))


def test_a_prefix_that_is_the_model_s_own_is_kept(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    torch.save(model.state_dict(), tmp_path / "w.pt")
    load_checkpoint(model, tmp_path / "w.pt")
    torch.save(model["module"].state_dict(), tmp_path / "inner.pt")
    with pytest.raises(CheckpointError, match=r"2 missing: module\.weight"):
        load_checkpoint(model, tmp_path / "inner.pt")


def test_old_checkpoints_without_batch_counters_load(tmp_path):
    state = {k: v for k, v in make(1).state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "w.pth")
    model = make(2)
    load_checkpoint(model, tmp_path / "w.pth")
    assert torch.equal(model.linear.weight, make(1).linear.weight)


def test_a_checkpoint_that_does_not_fit_lists_what_differs_and_changes_nothing(tmp_path):
    save_state(build_model(name="resnet32", num_classes=5), tmp_path / "w.safetensors")
    model = make(1)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, tmp_path / "w.safetensors")
    text = str(caught.value)
    assert "72 unexpected: layer1.3.bn1.bias" in text
    assert "and 64 more" in text
    assert "conv1.weight (16, 3, 3, 3) instead of (16, 1, 3, 3)" in text
    assert "missing" not in text
    assert same(model, make(1))


def test_files_that_are_no_checkpoints_are_refused_in_plain_words(tmp_path):
    model = make()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_checkpoint(model, tmp_path / "absent.pt")
    for name in ("text.safetensors", "text.pt"):
        (tmp_path / name).write_text("certainly not weights")
        with pytest.raises(CheckpointError, match=name):
            load_checkpoint(model, tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="no state dict but list"):
        load_checkpoint(model, tmp_path / "list.pt")
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="keys \\['epoch', 'lr'\\]"):
        load_checkpoint(model, tmp_path / "numbers.pt")
    save_state(model, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        load_checkpoint(model, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
        read_metadata(tmp_path / "cut.safetensors")


def test_a_pickled_module_is_not_executed(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"save the model's state_dict\(\)"):
        load_checkpoint(nn.Linear(2, 2), tmp_path / "module.pt")


def test_shared_channels_last_and_sliced_tensors_are_written_with_their_values(tmp_path):
    base = torch.arange(12.0)
    image = torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    save_state({"whole": base, "part": base[2:5], "twin": base, "image": image}, tmp_path / "w.safetensors")
    holder = nn.Module()
    for name, shape in (("whole", 12), ("part", 3), ("twin", 12), ("image", (2, 3, 4, 4))):
        holder.register_buffer(name, torch.zeros(shape))
    load_checkpoint(holder, tmp_path / "w.safetensors")
    assert torch.equal(holder.part, base[2:5])
    assert torch.equal(holder.twin, base)
    assert torch.equal(holder.image, image)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_state({"a": torch.ones(2)}, path)
    before = file_digest(path)

    def fail(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_state({"a": torch.zeros(2)}, path)
    assert file_digest(path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]


def test_the_digest_is_the_sha256_of_the_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert file_digest(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        file_digest(tmp_path / "g")


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_the_shared_cifar_checkpoints_fit_the_zoo(name):
    path = DATA / f"{name}_cifar10jpeg.safetensors"
    if not path.exists():
        pytest.skip(f"{path} is absent; AUTOPRUNE_DATA names its folder")
    model = build_model(name=name)
    before = model.linear.weight.clone()
    load_checkpoint(model, path)
    assert not torch.equal(before, model.linear.weight)
