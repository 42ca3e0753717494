"""Broken checkpoints, data, models and options: one clear message each, status 2, and no code that runs."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from typer.testing import CliRunner

from autoprune.cli import app
from autoprune.network.models.building import build_model

BASE = "schema: 1\nname: bad\nmodel: {name: mlp, arguments: {in_features: 4, hidden: [6]}}\ndata: {name: iris}\n"
IMAGES = BASE.replace("in_features: 4", "in_features: 192")


class Evil:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def told(*arguments: str) -> str:
    """Runs a command that must be refused, and returns its message."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result.output


def told_of_space(work: Path, text: str) -> str:
    (work / "space.yaml").write_text(text)
    message = told("inspect", "space.yaml")
    assert not (work / "ran").exists()
    return message


def checkpoints() -> dict[str, tuple[bytes, str]]:
    good = build_model(name="mlp", arguments={"in_features": 4, "hidden": [6]}, num_classes=3).state_dict()
    tensors, plain = save(good), pickled(good)
    wrong = {key: value for key, value in good.items() if "head" not in key}
    return {
        "cut.safetensors": (tensors[:-20], "not fully covered"),
        "header.safetensors": (b"\xff" * 8 + tensors[8:], "header too large"),
        "empty.safetensors": (b"", "header too small"),
        "text.safetensors": (b"hello", "not a safetensors file"),
        "infinite.safetensors": (save(good | {"head.bias": torch.full((3,), float("inf"))}), "infinity in head.bias"),
        "empty.pt": (b"", "it is cut off"),
        "text.pt": (b"hello world", "no file that torch.save has written"),
        "cut.pt": (plain[:-300], "cannot be read"),
        "zip.pt": (b"PK\x05\x06" + b"\0" * 18, "save the model's state_dict() instead"),
        "code.pt": (pickled({"a": Evil()}), "unpickling it could run code"),
        "bare_code.pt": (pickle.dumps(Evil(), protocol=2), "unpickling it could run code"),
        "module.pt": (pickled(torch.nn.Linear(2, 2)), "save the model's state_dict() instead"),
        "list.pt": (pickled([1, 2]), "holds no state dict but list"),
        "no_state.pt": (pickled({"epoch": 3}), "no state dict but a mapping with the keys ['epoch']"),
        "nothing.pt": (pickled({}), "holds no state dict"),
        "shape.pt": (pickled(good | {"head.weight": torch.zeros(5, 6)}), "head.weight (5, 6) instead of (3, 6)"),
        "missing.pt": (pickled(wrong), "2 missing: head.weight, head.bias"),
        "extra.pt": (pickled(good | {"more": torch.zeros(1)}), "1 unexpected: more"),
        "nan.pt": (pickled(good | {"head.bias": torch.full((3,), float("nan"))}), "NaN or infinity in head.bias"),
        "whole.pt": (pickled({k: v.to(torch.int64) for k, v in good.items()}), "holds int64 numbers"),
        "complex.pt": (pickled({k: v.to(torch.complex64) for k, v in good.items()}), "holds complex64 numbers"),
    }


def pickled(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


CHECKPOINTS = checkpoints()


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_cannot_be_used_is_told_and_runs_nothing(work: Path, name: str) -> None:
    data, words = CHECKPOINTS[name]
    (work / name).write_bytes(data)
    message = told_of_space(work, BASE + f"checkpoint: {name}\n")
    assert name in message
    assert words in message


def folder(root: Path, *, parts: tuple[str, ...] = ("train", "test"), count: int = 6, classes: str = "ab") -> Path:
    for part in parts:
        for label in classes:
            (root / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (8, 8), (i * 9, 0, 0)).save(root / part / label / f"{i}.png")
    return root


def broken_folder(root: Path, name: str) -> None:
    if name == "empty":
        root.mkdir()
    elif name == "one class":
        folder(root, classes="a")
    elif name == "too few":
        folder(root, count=1)
    elif name == "no training part":
        folder(root, parts=("test",))
    elif name == "a class without images":
        (folder(root) / "train/c").mkdir()
    elif name == "a class of the test part":
        (folder(root) / "test/z").mkdir()
        Image.new("RGB", (8, 8)).save(root / "test/z/0.png")
    elif name == "no image":
        (folder(root) / "train/a/0.png").write_bytes(b"not an image")
    elif name == "an image that is cut off":
        whole = (folder(root) / "train/a/1.png").read_bytes()
        (root / "train/a/0.png").write_bytes(whole[:30])
    elif name == "two sizes":
        Image.new("RGB", (9, 9)).save(folder(root) / "train/a/0.png")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("empty", "has no images under train/<class>/"),
        ("one class", "only one class, 'a'"),
        ("too few", "there are only 2 training samples"),
        ("no training part", "has no images under train/<class>/"),
        ("a class without images", "class 'c' has no image"),
        ("a class of the test part", "class 'z' has no training sample"),
        ("no image", "data/train/a/0.png cannot be read"),
        ("an image that is cut off", "data/train/a/0.png cannot be read"),
        ("two sizes", "set preprocessing.size"),
    ],
)
def test_a_folder_of_images_that_cannot_be_used_is_told(work: Path, name: str, words: str) -> None:
    broken_folder(work / "data", name)
    assert words in told_of_space(work, IMAGES.replace("{name: iris}", "{name: imagefolder, path: data}"))


def archive(path: Path, *members: tarfile.TarInfo) -> None:
    with tarfile.open(path, "w") as opened:
        for member in members:
            member.size = 3 if member.isfile() else 0
            opened.addfile(member, io.BytesIO(b"abc"))


def linked(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (None, "is not a tar archive that can be read"),
        ((), "has no images under train/<class>/"),
        ((tarfile.TarInfo("../../train/a/x.png"),), "cannot be read"),
        ((tarfile.TarInfo("/train/a/x.png"),), "cannot be read"),
        ((linked("train/a/x.png", "/etc/passwd"),), "has no images under train/<class>/"),
    ],
    ids=["no archive", "empty", "parent folders", "absolute", "link"],
)
def test_an_archive_is_read_and_never_unpacked(work: Path, members: Any, words: str) -> None:
    inside = work / "inside/deep"
    inside.mkdir(parents=True)
    if members is None:
        (inside / "data.tar").write_bytes(b"hello")
    else:
        archive(inside / "data.tar", *members)
    text = IMAGES.replace("{name: iris}", "{name: imagefolder, path: inside/deep/data.tar}")
    assert words in told_of_space(work, text)
    assert list(work.rglob("*.png")) == []


OWN = """
import torch
def pair(labels, x=None, **more):
    return {"train": (torch.rand(len(labels), 4) if x is None else x, torch.tensor(labels)), **more}
def negative(): return pair([-1] * 20)
def gap(): return pair([0, 2] * 10)
def enormous(): return pair([0, 10**12] * 10)
def nan(): return pair([0, 1] * 10, torch.full((20, 4), float("nan")))
def short(): return pair([0, 1] * 3, torch.rand(20, 4))
def nothing(): return None
def empty(): return {"train": (torch.rand(0, 4), torch.zeros(0, dtype=torch.int64))}
def misspelt(): return {"trian": (torch.rand(20, 4), torch.tensor([0, 1] * 10))}
def few(): return pair([0, 1, 0])
def unseen(): return pair([0, 1] * 20, test=(torch.rand(3, 4), torch.tensor([0, 1, 2])))
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("negative", "classes must be integers from 0 up"),
        ("gap", "class '1' has no training sample"),
        ("enormous", "the largest class is 1000000000000, and there are only 20 samples"),
        ("nan", "values that are not finite"),
        ("short", "20 samples but targets of shape (6,)"),
        ("nothing", "not NoneType"),
        ("empty", "the train part of the data is empty"),
        ("misspelt", "did you mean 'train'?"),
        ("few", "there are only 2 training samples"),
        ("unseen", "class '2' has no training sample"),
        ("absent", "has no 'absent'"),
    ],
)
def test_data_of_the_users_own_that_cannot_be_used_is_told(work: Path, name: str, words: str) -> None:
    module = f"own_bad_data_{name}"  # a name of its own: an imported module is that of an earlier directory
    (work / f"{module}.py").write_text(OWN)
    assert words in told_of_space(work, BASE.replace("{name: iris}", f"{{factory: '{module}:{name}'}}"))


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("mlp", "mpl", "unknown model 'mpl'"),
        ("hidden", "hiden", "did you mean 'hidden'?"),
        ("[6]", "six", "positive whole numbers"),
        ("[6]", "[-6]", "positive whole numbers, got [4, -6]"),
        ("[6]", "[0]", "positive whole numbers, got [4, 0]"),
        ("[6]", "[6.5]", "positive whole numbers"),
        ("[6]", "[999999999999]", "cannot be built"),
        ("{name: iris}", "{name: iris, calibration: 10000}", "ask for at most 25"),
        ("{name: iris}", "{name: iris, preprocessing: {mean: [0.1], std: [1.0]}}", "1 and 1 values for 4 channels"),
        ("{name: iris}", "{name: mnist, path: .}", "download: true would fetch it"),
        ("{name: iris}", "{name: cifar10, path: .}", "download: true would fetch it"),
        ("{name: iris}", "{name: iris}\ngroups: {include: [conv*]}", "matches no pruning group"),
        ("{name: iris}", "{name: iris}\ngroups: {exclude: ['*']}", "leave nothing to prune"),
    ],
)
def test_a_model_or_setting_that_does_not_fit_is_told(work: Path, before: str, after: str, words: str) -> None:
    assert words in told_of_space(work, BASE.replace(before, after))


@pytest.mark.parametrize(
    "arguments",
    [
        "search --trials 0", "search --trials many", "search --workers -1", "search --timeout soon",
        "search --timeout 0", "search --trials", "search --set seed", "search --set seed=x",
        "search --set nonsense.key=1",
        "search --name A/B",
        "search --name ../up", "search a b", "validate --no-such", "inspect --json=yes", "front", "front absent",
        "front ../../etc", "front absent --layers -1", "export absent", "export absent --format exe",
        "export absent --trial -1", "export absent@nobody", "dashboard --port 0", "dashboard --port 65536",
        "dashboard --port www", "pick absent --knee --trial x", "finetune absent --epochs x", "compare absent 1 x",
        "explain absent --trial -2", "nonsense", "submit nowhere.yaml", "cancel absent", "logs absent",
    ],
)  # fmt: skip
def test_a_command_with_bad_options_is_refused(work: Path, arguments: str) -> None:
    assert told(*arguments.split()).strip()
    assert not (work / "exports").exists()


def test_the_mlflow_ui_does_not_listen_for_other_machines_without_a_login(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HOST", "0.0.0.0")
    assert "would let other machines in without a login" in told("mlflow-ui")
