"""Memory: many trials may not add up, and images that do not fit into it are streamed."""

import ctypes
import gc
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune.network.calibration import targets
from autoprune.network.calibration.moments import gather
from autoprune.network.criteria.channels import score
from autoprune.network.criteria.inputs import Evidence
from autoprune.network.criteria.learning import learn
from autoprune.network.criteria.tables import error_tables
from autoprune.network.data import folders
from autoprune.network.data.loading import DataSettings, as_splits, load_data
from autoprune.network.data.samples import StreamSplit
from autoprune.network.tracing.trace import trace
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

pytestmark = pytest.mark.slow
MIB = 2**20


def resident() -> int:
    """Returns the bytes of this process that are in memory now."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read from /proc")
def test_five_hundred_trials_do_not_grow_the_process(bench):
    """A copy of the model, or its moments, that stayed behind would show; a leak of 20 kB a trial does."""

    def trials(count: int) -> None:
        for number in range(count):
            policy = uniform_policy(bench.groups, 0.2 + 0.6 * (number % 7) / 7, "l2")
            bench.evaluate(policy, Fidelity("screen") if number % 5 else Fidelity("tune", epochs=0.2))

    trials(100)
    before = resident()
    trials(400)
    assert resident() - before < 8 * MIB


def peak_of(call) -> int:
    """Returns by how many bytes the process grew at most while `call` ran."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls gave back must not hide what this one takes
    before = resident()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    call()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1]) - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read from /proc")
def test_eight_times_the_calibration_images_are_learnt_from_in_the_same_memory(monkeypatch):
    """1,792 more images are 350 MB in float32; what is held at once is a batch, the moments and the refit's images."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 8, 3, stride=4), torch.nn.ReLU(), torch.nn.Conv2d(8, 8, 3, stride=2)]
    model = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 4))
    network = trace(model.eval(), torch.zeros(2, 3, 128, 128))
    monkeypatch.setattr(targets, "IMAGE_BYTES", 128 * network.cost_model.dense()["activation_bytes"])
    images = torch.randint(0, 256, (2048, 3, 128, 128), dtype=torch.uint8)
    data = as_splits({name: (images, torch.arange(2048) % 4) for name in ("train", "calibration", "val", "test")})

    def learning(count: int) -> int:
        few = replace(data.calibration, index=data.calibration.index[:count])
        return peak_of(lambda: learn(network, few, criteria=["l2", "obs"]))

    learning(256)
    assert learning(2048) - learning(256) < 48 * MIB


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read from /proc")
def test_tables_and_inverses_hold_few_matrices_of_the_widest_layer_however_many_criteria_there_are():
    """As the module `tables` says: two in float64, one in float32 and strips; for obs an inverse beside them."""
    width = 2304
    matrix = 8 * width**2  # 40 MiB: blocks beyond 32 MiB go back to the system at once
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, width), torch.nn.Tanh(), torch.nn.Linear(width, 4)).eval()
    x = torch.randn(4000, 8)
    network = trace(model, x[:2])
    evidence = Evidence(network, gather(network, [x]))
    names = ["l1", "l2", "fpgm", "activation", "random"]
    scores = score(evidence, names)
    error_tables(evidence, {"l1": scores["l1"]})  # what is loaded at the first call does not count
    assert peak_of(lambda: error_tables(evidence, scores)) < 3 * matrix
    assert peak_of(lambda: score(evidence, ["obs"])) < 4 * matrix


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A folder as ImageNet has it, of JPEG files of different sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 24), ("val", 8)):
        for name in ("n01440764", "n01443537"):
            folder = tmp_path / "imagenet" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = (int(side) for side in rng.integers(240, 320, 2))
                pixels = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((width, height)).save(folder / f"{number}.JPEG")
    return tmp_path / "imagenet"


def test_streamed_epochs_read_every_image(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY_LIMIT", MIB)
    settings = DataSettings(name="imagefolder", path=str(photographs), size=224, calibration=4, flip=True)
    splits = load_data(settings, seed=0, cache_dir=tmp_path / "cache")
    train = splits.train
    assert isinstance(train, StreamSplit)
    order = torch.Generator().manual_seed(0)

    def epoch() -> int:
        seen = 0
        for x, y in train.batches(16, shuffle=order, augment=True):
            assert x.shape[1:] == (3, 224, 224)
            assert x.dtype == torch.float32
            seen += len(y)
        return seen

    assert [epoch() for _ in range(2)] == [len(train)] * 2


def test_the_same_validation_images_are_scored_at_each_pass_over_a_stream(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "MEMORY_LIMIT", MIB)
    settings = DataSettings(name="imagefolder", path=str(photographs), size=64, calibration=4)
    val = load_data(settings, seed=0, cache_dir=tmp_path / "cache").val
    passes = [torch.cat([x for x, _ in val.batches(2, limit=5)]) for _ in range(2)]
    assert len(passes[0]) == 5
    assert torch.equal(passes[0], passes[1])
