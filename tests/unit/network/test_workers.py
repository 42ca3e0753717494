"""A workbench that travels: what is shared, what is copied, which GPU each worker sees, and models that come back."""

import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from autoprune.network import sharing, workers
from autoprune.network.artifacts.saved import read_document
from autoprune.network.data.loading import as_splits
from autoprune.network.devices import device as devices_device
from autoprune.network.sharing import SharedFile, mapped, pack
from autoprune.network.workers import RemoteFactory, WorkerFactory, mapped_factory, packed, received
from autoprune.policy import uniform_policy
from autoprune.results import Fidelity

SCREEN, TUNE = Fidelity("screen"), Fidelity("tune", epochs=1)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(200, 200)
        self.second = nn.Linear(200, 200)
        self.second.weight = self.first.weight
        self.register_buffer("table", torch.arange(10_000.0))


def silent() -> None:
    pass


def same(first, second):
    return first.metrics == second.metrics and first.identity == second.identity


def value():
    torch.manual_seed(0)
    base = torch.randn(100, 300)
    return {
        "base": base,
        "view": base[10:20, ::2],
        "channels_last": torch.randn(2, 16, 20, 20).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(20_000).bfloat16(),
        "small": torch.arange(3),
        "array": np.arange(10_000, dtype=np.int64).reshape(100, 100),
        "text": ["a", {"b": 1}],
        "model": Tied(),
    }


def check(found, expected):
    for name in ("base", "view", "channels_last", "half", "small"):
        assert torch.equal(found[name], expected[name])
        assert found[name].stride() == expected[name].stride()
        assert found[name].dtype == expected[name].dtype
    assert np.array_equal(found["array"], expected["array"])
    assert found["text"] == expected["text"]
    assert found["view"].untyped_storage().data_ptr() == found["base"].untyped_storage().data_ptr()
    model = found["model"]
    assert model.second.weight is model.first.weight
    assert isinstance(model.first.weight, nn.Parameter)
    assert model.first.weight.requires_grad
    assert torch.equal(model.first.weight, expected["model"].first.weight)


def test_a_value_is_the_same_after_a_way_through_a_file_and_each_memory_is_kept_once(tmp_path):
    expected = value()
    parts = pack(expected)
    assert len(parts.buffers) == 6  # base and its view, images, half, array, tied weight, table
    assert len(parts.rest) < 10_000
    with SharedFile(parts, tmp_path) as shared:
        check(mapped(shared.path, shared.spans, shared.rest), expected)


def test_what_one_reader_of_a_file_writes_is_its_own(tmp_path):
    with SharedFile(pack(value()), tmp_path) as shared:
        one, other = (mapped(shared.path, shared.spans, shared.rest) for _ in range(2))
        one["base"].zero_()
        with torch.no_grad():
            one["model"].first.weight.fill_(7)
        assert other["base"].abs().sum() > 0
        check(mapped(shared.path, shared.spans, shared.rest), value())


def test_of_what_may_only_be_read_a_network_has_its_own_copy():
    expected = value()
    model = expected["model"]
    parts = pack(expected, own=[*model.parameters(), *model.buffers()])
    for buffer in parts.buffers:
        buffer.flags.writeable = False
    found = parts.value()
    check(found, expected)
    with torch.no_grad():
        found["model"].first.weight.fill_(7)
        found["model"].table.zero_()
    check(parts.value(), expected)


def test_a_value_without_anything_large_needs_no_file_content(tmp_path):
    with SharedFile(pack({"a": 1}), tmp_path) as shared:
        assert mapped(shared.path, shared.spans, shared.rest) == {"a": 1}


def test_the_file_goes_with_its_owner_and_those_of_killed_owners_with_the_next(tmp_path):
    left = tmp_path / f"{sharing._PREFIX}1-a.bin"
    left.write_bytes(b"left behind")
    with SharedFile(pack(value()), tmp_path) as first, SharedFile(pack(value()), tmp_path) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first.path, second.path])
    assert list(tmp_path.iterdir()) == []


def test_a_workbench_gives_the_very_same_numbers_wherever_it_is_built(bench, tmp_path):
    policy = uniform_policy(bench.groups, 0.5, "obs")
    with devices_device.threads(1):  # that many the workers below take
        expected = bench.evaluate(policy, SCREEN)
        assert same(WorkerFactory(bench)(silent)(policy, SCREEN), expected)
        with SharedFile(packed(bench), tmp_path) as shared:
            factory = pickle.loads(pickle.dumps(mapped_factory(shared, 1)))
            assert same(factory(silent)(policy, SCREEN), expected)
        remote = pickle.loads(pickle.dumps(RemoteFactory(packed(bench), 1)))
        assert same(remote(silent)(policy, SCREEN).result, expected)


def test_a_model_that_was_made_elsewhere_comes_back_whole(bench, tmp_path):
    models = tmp_path / "models"
    keeping = replace(bench, models=models)
    policy = uniform_policy(bench.groups, 0.5, "l2")
    parcel = pickle.loads(pickle.dumps(RemoteFactory(packed(keeping), 1)(silent)(policy, TUNE)))
    assert not models.exists()
    result = received(parcel, models)
    assert result.model_path == str(models / f"tune-{result.identity}")
    assert read_document(Path(result.model_path))["policy"] == policy.to_json()
    assert [path.name for path in models.iterdir()] == [f"tune-{result.identity}"]
    assert received(RemoteFactory(packed(keeping), 1)(silent)(policy, SCREEN), models).model_path is None


def test_cores_are_divided_among_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert [workers.threads_per_worker(n) for n in (1, 2, 4, 9)] == [6, 3, 1, 1]
    assert workers.default_workers("cpu") == 4


@pytest.mark.parametrize(
    ("device", "seen", "expected"),
    [
        ("cpu", None, []),
        ("cuda", None, ["0", "1", "2"]),
        ("cuda:1", None, ["1"]),
        ("cuda", "5, 7,2", ["5", "7", "2"]),
        ("cuda:2", "5,7,2", ["2"]),
        ("cuda", "GPU-a,GPU-b,GPU-c", ["GPU-a", "GPU-b", "GPU-c"]),
    ],
)
def test_each_worker_sees_one_gpu_of_those_that_may_be_used(monkeypatch, device, seen, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert [own["CUDA_VISIBLE_DEVICES"] for own in workers.environments(device)] == expected
    assert device == "cpu" or workers.default_workers(device) == len(expected)


@pytest.mark.parametrize(
    ("device", "gpus", "processes", "share"),
    [("cpu", 0, 4, 1.0), ("cuda", 2, 2, 1.0), ("cuda", 1, 4, 0.25), ("cuda", 2, 3, 0.5), ("cuda:1", 2, 2, 0.5)],
)
def test_processes_that_share_a_gpu_divide_it(monkeypatch, device, gpus, processes, share):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert workers.gpu_share(device, processes) == share


@pytest.mark.parametrize(
    ("device", "threads", "share", "fractions", "readers"),
    [
        ("cpu", 1, 1.0, [], 0),
        ("cpu", 4, 0.5, [], 3),
        ("cuda", 1, 1.0, [], 1),
        ("cuda", 16, 0.5, [0.45], 8),
        ("cuda", 3, 0.25, [0.225], 2),
    ],
)
def test_a_process_takes_its_part_of_the_cores_and_of_its_gpu_and_no_more(
    bench, monkeypatch, device, threads, share, fractions, readers
):
    """Streamed samples are read by what threads are left, so that processes do not start more readers than cores."""
    found, kept, before = [], [], torch.get_num_threads()
    monkeypatch.setattr(workers, "keep_freed", lambda: kept.append(True))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", found.append)
    streamed = as_splits({"train": TensorDataset(torch.zeros(40, 2, 6, 6), torch.arange(40) % 4)})
    chosen = replace(streamed.test, workers=5)
    there = replace(bench, device=device, splits=replace(streamed, val=bench.splits.val, test=chosen))
    try:
        settled = workers.settle(there, threads, share)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert found == pytest.approx(fractions)
    assert kept == ([True] if device == "cpu" else [])
    assert settled.splits.train.workers == settled.splits.calibration.workers == readers
    assert settled.splits.val is bench.splits.val
    assert settled.splits.test.workers == 5  # somebody has said so


def test_a_workbench_of_the_second_gpu_is_packed_for_the_only_one_that_a_worker_sees(bench):
    there = replace(bench, device="cuda:1", conditions=replace(bench.conditions, device="cuda:1"))
    found = packed(there).value()
    assert (found.device, found.conditions.device) == ("cuda", "cuda")


def test_an_evaluation_on_a_worker_has_the_threads_that_it_was_given(bench, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    with SharedFile(packed(bench), tmp_path) as shared:
        mapped_factory(shared, 3)(silent)
    RemoteFactory(packed(bench), 5)(silent)
    assert asked == [3, 5]
