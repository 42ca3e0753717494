"""The Python interface as a script uses it: trace, prune, search and load on models of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autoprune

RECIPE = {"batch_size": 32, "lr": 0.02, "precision": "float32"}
LADDER = [
    {"rung": "screen", "epochs": 0},
    {"rung": "tune", "epochs": 1, "trials": 4},
    {"rung": "final", "epochs": 1, "trials": 3, "test": True},
]
SEARCH = {"controls": 2, "ladder": LADDER}


class Convolutional(nn.Module):
    """A small network with a residual connection, whose class no space file could name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.inner = nn.Conv2d(8, 12, 3, padding=1)
        self.outer = nn.Conv2d(12, 8, 3, padding=1)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def stripes(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Returns noisy 8x8 images with horizontal or vertical stripes, and which."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 2, (count,), generator=generator)
    bars = (torch.arange(8) % 2).float().expand(8, 8)
    x = torch.where(y[:, None, None] == 1, bars, bars.T)[:, None]
    return x + 0.3 * torch.randn(count, 1, 8, 8, generator=generator), y


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    network = Convolutional()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    x, y = stripes(256, 0)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(network(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.fixture(autouse=True)
def no_mlflow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A store that is away: these tests are about what the functions return."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)


def test_trace_tells_groups_and_what_is_frozen_and_why(model: nn.Module) -> None:
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8))
    assert {group.name: group.size for group in net.groups} == {"stem": 8, "inner": 12}
    assert {frozen.name: "output" in frozen.reason for frozen in net.frozen} == {"head": True}
    macs = 64 * 8 * 9 + 64 * 12 * 8 * 9 + 64 * 8 * 12 * 9 + 16
    assert net.cost_model.dense()["macs"] == macs
    assert net.cost_model.costs({"inner": 6})["macs"] == macs - 64 * 6 * 8 * 9 * 2


def test_prune_returns_a_smaller_model_and_leaves_the_dense_one_alone(model: nn.Module) -> None:
    before = copy.deepcopy(model.state_dict())
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8))
    x, y = stripes(128, 1)
    small = autoprune.prune(net, ratios=0.5, criterion="l2", calibration=[x[:64], x[64:]])
    assert isinstance(small, Convolutional)
    assert (small.stem.out_channels, small.inner.out_channels, small.outer.out_channels) == (4, 6, 4)
    costs = net.cost_model.costs({"stem": 4, "inner": 6})
    assert sum(p.numel() for p in small.parameters()) == costs["params"]
    with torch.no_grad():
        assert (small.eval()(x).argmax(1) == y).float().mean() > 0.9
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_prune_takes_a_ratio_for_some_groups_and_leaves_the_others_whole(model: nn.Module) -> None:
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8))
    small = autoprune.prune(net, {"inner": 0.75})
    assert isinstance(small, Convolutional)
    assert (small.stem.out_channels, small.inner.out_channels) == (8, 3)
    with torch.no_grad():
        x, _ = stripes(4, 2)
        assert torch.allclose(autoprune.prune(net, 0.0)(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ratios": 1.5}, "outside"),
        ({"ratios": 1.0}, "cannot be removed whole: without it the output no longer depends"),
        ({"ratios": {"iner": 0.5}}, "did you mean 'inner'"),
        ({"ratios": 0.5, "criterion": "l3"}, "unknown criterion 'l3'"),
        ({"ratios": 0.5, "criterion": "obs"}, "needs calibration batches"),
    ],
    ids=str,
)
def test_prune_refuses_what_it_cannot_do(arguments: dict[str, Any], words: str, model: nn.Module) -> None:
    net = autoprune.trace(model, torch.zeros(2, 1, 8, 8))
    with pytest.raises(autoprune.PolicyError, match=words):
        autoprune.prune(net, **arguments)


def run(model: nn.Module, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "data": {"train": stripes(256, 0), "test": stripes(64, 9)},
        "budget": {"macs": 0.6, "front": [0.1, 0.6]},
        "trials": 8,
        "criteria": ("l2", "obs"),
        "recipe": RECIPE,
        "search": SEARCH,
        "device": "cpu",
    }
    return autoprune.search(model, **{**settings, **changes})


def test_search_returns_a_front_whose_models_load_back_and_goes_on_where_it_ended(
    model: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = copy.deepcopy(model.state_dict())
    result = run(model)
    assert result.complete
    assert result.name == "convolutional"
    assert result.text.startswith("convolutional: the front after the rung final")
    assert "MLflow is away" in result.text
    assert "autoprune.load(" in result.text
    dense = autoprune.trace(model, torch.zeros(2, 1, 8, 8)).cost_model.dense()["macs"]
    assert result.front
    for point in result.front:
        assert point.costs["macs"] <= 0.6 * dense
        assert point.test_accuracy is not None
        small = autoprune.load(result.model_path(point.trial), Convolutional)
        assert isinstance(small, Convolutional)
        assert small.inner.out_channels == point.widths["inner"]
        x, y = stripes(64, 9)
        with torch.no_grad():
            assert (small(x).argmax(1) == y).float().mean().item() == pytest.approx(point.test_accuracy)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not model.training
    capsys.readouterr()
    again = run(model)
    assert [p.trial for p in again.front] == [p.trial for p in result.front]
    assert "screen: 8 trials, 8 of them finished earlier" in capsys.readouterr().err
    with pytest.raises(autoprune.StudyError, match="no finished trial 99"):
        result.model_path(99)
    with pytest.raises(autoprune.CheckpointError, match="factory"):
        autoprune.load(result.model_path(result.front[0].trial))
    with pytest.raises(autoprune.StudyError, match="data"):
        run(model, data={"train": stripes(256, 5), "test": stripes(64, 9)})


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)  # type: ignore[no-any-return]


def squared(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output.squeeze(1), target.float())


def closeness(output: Tensor, target: Tensor) -> Tensor:
    return 1 - (output.squeeze(1) - target).abs().mean() / 6


def test_search_takes_a_loss_and_a_metric_of_its_own(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.rand(240, 6, generator=generator) > 0.5).float()
    y = x.sum(1).long()  # how many of the six are on
    torch.manual_seed(0)
    counter = Counter()
    optimizer = torch.optim.Adam(counter.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        squared(counter(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = run(
        counter,
        data={"train": (x, y)},
        budget={"params": 0.6},
        loss=squared,
        metric=closeness,
        name="counting",
        home=tmp_path / "elsewhere",
        recipe={**RECIPE, "distillation": None},
    )
    assert result.complete
    point = result.front[-1]
    assert point.val_accuracy > 0.9
    small = autoprune.load(result.model_path(point.trial), Counter)
    with torch.no_grad():
        assert closeness(small(x), y).item() > 0.9
    assert (tmp_path / "elsewhere/optuna.db").is_file()
    assert not (tmp_path / ".autoprune").exists()


# Tasks without classes


def train(network: nn.Module, x: Tensor, y: Tensor, *, loss: Any, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()
    return network.eval()


class Regression(nn.Module):
    """A perceptron with one real answer."""

    def __init__(self, *, flat: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 1))
        self.flat = flat

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return y.squeeze(1) if self.flat else y  # type: ignore[no-any-return]


def heights(count: int) -> tuple[Tensor, Tensor]:
    """Returns tables `(count, 5)` and a smooth real function of them, `(count,)`, with a mean far from 0."""
    x = torch.randn(count, 5, generator=torch.Generator().manual_seed(3))
    return x, 20 + 3 * x[:, 0] - 2 * x[:, 1] + x[:, 2].abs()


def r2(output: Tensor, target: Tensor) -> Tensor:
    return 1 - (output - target).square().sum() / (target - target.mean()).square().sum()


def negative_squares(output: Tensor, target: Tensor) -> Tensor:
    return -(output - target).square().mean()


FEW = {
    "trials": 6,
    "controls": 0,
    "ladder": [{"rung": "tune", "epochs": 1}, {"rung": "final", "epochs": 3, "trials": 3, "test": True}],
}


@pytest.mark.parametrize(("flat", "metric"), [(True, r2), (False, negative_squares)], ids=["(N,) R2", "(N, 1) -MSE"])
def test_search_prunes_a_regression_network(flat: bool, metric: Any, tmp_path: Path) -> None:
    x, y = heights(400)
    y = y if flat else y[:, None]
    torch.manual_seed(0)
    dense = train(Regression(flat=flat), x, y, loss=F.mse_loss, steps=400)
    test = (x[300:], y[300:])
    result = run(
        dense,
        data={"train": (x[:300], y[:300]), "test": test},
        budget={"params": 0.7, "front": [0.2, 0.7]},
        trials=6,
        loss=F.mse_loss,
        metric=metric,
        search=FEW,
    )
    assert result.complete
    assert result.front
    for point in result.front:
        small = autoprune.load(result.model_path(point.trial), lambda: Regression(flat=flat))
        assert (
            sum(p.numel() for p in small.parameters())
            == point.costs["params"]
            <= 0.7 * result.view.dense.costs["params"]
        )
        with torch.no_grad():
            assert metric(small(test[0]), test[1]).item() == pytest.approx(point.test_accuracy, rel=1e-3, abs=1e-3)
    with torch.no_grad():
        best = autoprune.load(result.model_path(result.front[-1].trial), lambda: Regression(flat=flat))
        assert r2(best(test[0]), test[1]) > 0.8
    pictures(result, tmp_path)


def pictures(result: Any, folder: Path) -> None:
    """Draws the report: an accuracy outside of [0, 1] breaks nothing."""
    assert 0 <= result.view.hypervolume < float("inf")
    assert autoprune.report.front_png(result.view, folder / "front.png").stat().st_size > 1000
    assert "Hypervolume" in autoprune.report.render_front(result.view)


class Segmentation(nn.Module):
    """A small U-Net: down, up again by a transposed convolution, and a skip that is concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.ReLU())
        self.up = nn.ConvTranspose2d(12, 8, 2, stride=2)
        self.join = nn.Sequential(nn.Conv2d(16, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        joined = torch.cat([skip, self.up(self.deep(skip))], 1)
        return self.head(self.join(joined))  # type: ignore[no-any-return]


def rectangles(count: int) -> tuple[Tensor, Tensor]:
    """Returns noisy 8x8 images of a bright rectangle, and masks `(count, 8, 8)` of where it is."""
    generator = torch.Generator().manual_seed(4)
    low, high = (torch.randint(0, 4, (count, 2, 1), generator=generator) + shift for shift in (0, 4))
    inside = (torch.arange(8) >= low) & (torch.arange(8) <= high)  # (count, 2, 8)
    mask = (inside[:, 0, :, None] & inside[:, 1, None, :]).long()
    return mask[:, None].float() + 0.5 * torch.randn(count, 1, 8, 8, generator=generator), mask


def iou(output: Tensor, mask: Tensor) -> Tensor:
    found = output.argmax(1)
    return (found & mask).sum() / (found | mask).sum()


def test_search_prunes_a_segmentation_network(tmp_path: Path) -> None:
    x, y = rectangles(256)
    torch.manual_seed(0)
    dense = train(Segmentation(), x, y, loss=F.cross_entropy, steps=60)
    test = (x[192:], y[192:])
    result = run(
        dense,
        data={"train": (x[:192], y[:192]), "test": test},
        budget={"macs": 0.7, "front": [0.3, 0.7]},
        trials=6,
        loss=F.cross_entropy,
        metric=iou,
        search=FEW,
    )
    assert result.complete
    assert result.front
    assert {"down.0", "deep.0", "up", "join.0"} <= set(result.view.sizes)
    for point in result.front:
        small = autoprune.load(result.model_path(point.trial), Segmentation)
        assert isinstance(small, Segmentation)
        assert small.up.out_channels == point.widths["up"]
        with torch.no_grad():
            assert iou(small(test[0]), test[1]).item() == pytest.approx(point.test_accuracy, abs=1e-3)
    assert result.front[-1].val_accuracy > 0.7
    pictures(result, tmp_path)


@pytest.mark.parametrize(
    "given", [{}, {"loss": F.mse_loss}, {"metric": r2}], ids=["neither", "loss alone", "metric alone"]
)
def test_search_asks_for_both_a_loss_and_a_metric_where_there_are_no_classes(
    given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(autoprune.InputError, match="both a loss and a metric of your own are needed"):
        run(Regression(flat=True), data={"train": heights(100)}, budget={"params": 0.7}, **given)
    assert not (tmp_path / ".autoprune/optuna.db").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"data": {"train": stripes(0, 0)}}, autoprune.DataError, "empty"),
        ({"data": {"trian": stripes(8, 0)}}, autoprune.DataError, "did you mean 'train'"),
        ({"budget": {"macs": 0.001}}, autoprune.BudgetError, "the least possible is"),
        ({"budget": {"flops": 0.5}}, autoprune.SpaceError, "flops"),
        ({"criteria": ("l2", "tailor")}, autoprune.SpaceError, "did you mean 'taylor'"),
        ({"groups": {"include": ["iner"]}}, autoprune.InputError, "matches no pruning group"),
        ({"home": "/proc/nowhere"}, autoprune.StudyError, "cannot be written"),
        ({"workers": 0}, autoprune.InputError, "at least one worker, got 0"),
        ({"gpus_per_trial": 0.5}, autoprune.InputError, "belong to ray"),
        ({"ray": "local", "cpus_per_trial": 0.0}, autoprune.InputError, "an evaluation needs processors"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_search_refuses_bad_input_before_it_writes_a_study(
    changes: dict[str, Any], error: type[Exception], words: str, model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        run(model, **changes)
    assert not (tmp_path / ".autoprune/optuna.db").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {"schedule": {"kind": "iterative", "steps": 2, "share": 0.5}},
        {"regularisation": {"kind": "growing_l2"}},
        {"compensation": "merge"},
    ],
    ids=["iterative", "growing_l2", "merge"],
)
def test_a_search_with_another_way_of_pruning_ends_with_a_front_whose_models_load(
    model: nn.Module, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    outcome = autoprune.search(
        model,
        data={"train": stripes(192, 1), "val": stripes(96, 2), "test": stripes(96, 3)},
        budget={"macs": 0.7, "front": [0.2, 0.7]},
        trials=4,
        home=tmp_path / "home",
        criteria=("l2", "random"),
        recipe={**RECIPE, **recipe},
        search={"controls": 0, "ladder": [LADDER[0], {**LADDER[1], "trials": 2, "test": True}]},
    )
    assert outcome.complete
    assert outcome.front
    small = autoprune.load(outcome.model_path(outcome.front[0].trial), Convolutional)
    with torch.no_grad():
        assert small(stripes(4, 5)[0]).shape == (4, 2)


class Reader(nn.Module):
    """A bag of embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.mid(self.emb(ids).mean(1)).relu())  # type: ignore[no-any-return]


@pytest.mark.parametrize("as_dataset", [False, True], ids=["tensors", "Dataset"])
def test_a_model_of_token_ids_is_searched(as_dataset: bool, tmp_path: Path) -> None:
    ids = torch.randint(0, 50, (400, 12), generator=torch.Generator().manual_seed(0))
    y = (ids.float().mean(1) > 25).long()
    train: Any = torch.utils.data.TensorDataset(ids, y) if as_dataset else (ids, y)
    found = autoprune.search(
        Reader(), data={"train": train}, budget={"macs": 0.5}, trials=3, home=tmp_path, recipe=RECIPE, search=SEARCH
    )
    assert found.front


def mean_absolute_error(output: Tensor, target: Tensor) -> Tensor:
    """Lower is better, which a search does not know."""
    return (output - target).abs().mean()


def test_a_metric_that_is_better_when_everything_is_pruned_is_warned_about(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 1))
    x = torch.randn(400, 6)
    with torch.no_grad():
        y = network(x)
    found = autoprune.search(
        network,
        data={"train": (x, y)},
        budget={"macs": 0.5},
        trials=3,
        home=tmp_path,
        loss=F.mse_loss,
        metric=mean_absolute_error,
        recipe=RECIPE,
        search=SEARCH,
    )
    assert "where lower is better, give the negative" in " ".join(found.text.split())
