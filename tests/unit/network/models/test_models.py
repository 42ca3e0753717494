"""The zoo, torchvision's builders and factories."""

import re
import sys
import urllib.error

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.models.building import build_model, import_factory, model_names


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("resnet20", {}, (2, 3, 32, 32)),
        ("resnet20", {"in_channels": 1, "shortcut": "B"}, (2, 1, 8, 8)),
        ("resnet56", {"in_channels": 1}, (2, 1, 7, 7)),
        ("vgg16_bn_32", {"in_channels": 1}, (2, 1, 32, 32)),
        ("mlp", {"in_features": 12, "hidden": [5]}, (2, 3, 2, 2)),
        ("mlp", {"in_features": 4, "hidden": []}, (2, 4)),
        ("lstm", {"in_features": 8, "layers": 2}, (2, 1, 8, 8)),
        ("lstm", {"in_features": 24}, (2, 3, 8, 8)),
        ("lstm", {"in_features": 6}, (2, 5, 6)),
        ("resnet18", {}, (2, 3, 32, 32)),
        ("googlenet", {}, (2, 3, 64, 64)),
    ],
)
def test_a_named_model_gives_logits_for_as_many_classes_as_asked(name, arguments, shape):
    model = build_model(name=name, arguments=arguments, num_classes=7)
    assert model(torch.randn(shape)).shape == (2, 7)


@pytest.mark.parametrize(("name", "params"), [("resnet20", 269_722), ("resnet32", 464_154), ("resnet56", 853_018)])
def test_the_cifar_resnets_have_the_paper_s_number_of_parameters(name, params):
    assert sum(p.numel() for p in build_model(name=name).parameters()) == params


def test_option_a_subsamples_and_pads_zeros_on_both_sides():
    block = build_model(name="resnet20").layer2[0].eval()
    nn.init.zeros_(block.conv2.weight)  # leaves the shortcut alone, as bn2 has no shift yet
    x = torch.rand(1, 16, 6, 6)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().max() == 0
    assert out[:, 24:].abs().max() == 0


def test_the_zoo_comes_first_and_torchvision_s_classifiers_follow():
    names = model_names()
    assert names[:2] == ["resnet20", "resnet32"]
    assert {"resnet50", "vit_b_16", "shufflenet_v2_x1_0"} <= set(names)
    assert "fasterrcnn_resnet50_fpn" not in names


def test_the_seed_alone_decides_the_initial_weights():
    torch.manual_seed(1)
    first = build_model(name="mlp", arguments={"in_features": 3}, seed=5)
    before = torch.get_rng_state()
    second = build_model(name="mlp", arguments={"in_features": 3}, seed=5)
    other = build_model(name="mlp", arguments={"in_features": 3}, seed=6)
    assert torch.equal(first.head.weight, second.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert torch.equal(before, torch.get_rng_state())


def test_a_number_of_classes_among_the_arguments_wins_over_the_data_s():
    assert build_model(name="resnet20", arguments={"num_classes": 3}, num_classes=10).linear.out_features == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "either a name or a factory"),
        ({"name": "mlp", "factory": "a:b"}, "either a name or a factory"),
        ({"name": "rsnet20"}, "did you mean 'resnet20'"),
        ({"name": "resnet20", "weights": "DEFAULT"}, "use a checkpoint"),
        ({"name": "resnet20", "arguments": {"in_chanels": 1}}, "did you mean 'in_channels'"),
        ({"name": "resnet20", "arguments": {"shortcut": "C"}}, "'A' or 'B'"),
        ({"name": "resnet18", "arguments": {"nonsense": 1}}, "nonsense"),
        ({"name": "mlp"}, "in_features"),
        ({"name": "resnet18", "weights": "IMAGENET"}, "IMAGENET1K_V1"),
        ({"name": "resnet18", "weights": "DEFAULT", "num_classes": 10}, "1000 classes but 10"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_in_plain_words(settings, message):
    with pytest.raises(InputError, match=re.escape(message)):
        build_model(**settings)


def test_weights_that_cannot_be_downloaded_name_the_place_for_the_file(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    torch_home = tmp_path / "torch"
    monkeypatch.setenv("TORCH_HOME", str(torch_home))
    with pytest.raises(InputError, match=r"put the file resnet18-.*\.pth") as caught:
        build_model(name="resnet18", weights="DEFAULT")
    assert str(torch_home) in str(caught.value)


def test_weights_that_lie_in_the_hub_folder_are_loaded_without_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    made = build_model(name="squeezenet1_1", seed=3)
    torch.save(made.state_dict(), folder / "squeezenet1_1-b8a52dc0.pth")
    loaded = build_model(name="squeezenet1_1", weights="IMAGENET1K_V1", seed=4)
    assert torch.equal(loaded.features[0].weight, made.features[0].weight)


def test_a_factory_of_the_working_directory_is_called_with_its_arguments(monkeypatch, tmp_path):
    (tmp_path / "own_net_of_the_test.py").write_text(
        "from torch import nn\n"
        "def make(width, num_classes):\n    return nn.Linear(width, num_classes)\n"
        "def fixed():\n    return nn.Linear(2, 2)\n"
        "def wrong():\n    return 3\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    made = build_model(factory="own_net_of_the_test:make", arguments={"width": 3}, num_classes=4)
    assert made.weight.shape == (4, 3)
    assert build_model(factory="own_net_of_the_test:fixed", num_classes=4).out_features == 2
    with pytest.raises(InputError, match="returned int"):
        build_model(factory="own_net_of_the_test:wrong")
    with pytest.raises(InputError, match="int and cannot be called"):
        import_factory("own_net_of_the_test:number")
    with pytest.raises(InputError, match="did you mean 'make'"):
        import_factory("own_net_of_the_test:mak")


def test_a_factory_that_cannot_be_imported_says_why(monkeypatch, tmp_path):
    (tmp_path / "needs_absent_of_the_test.py").write_text("import absent_module_of_the_test\n")
    (tmp_path / "broken_of_the_test.py").write_text("def (:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match=r"form package\.module:function"):
        import_factory("nocolon")
    with pytest.raises(InputError, match="no module 'nowhere_of_the_test'"):
        import_factory("nowhere_of_the_test:make")
    with pytest.raises(InputError, match="needs the module 'absent_module_of_the_test'"):
        import_factory("needs_absent_of_the_test:make")
    with pytest.raises(InputError, match="importing broken_of_the_test fails"):
        import_factory("broken_of_the_test:make")
