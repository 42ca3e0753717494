"""Latency and peak memory: how they are measured, and that measuring changes nothing."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import nn

from autoprune.network.devices import device as devices_device
from autoprune.network.devices.device import ieee
from autoprune.network.latency import timing
from autoprune.network.latency.timing import (
    Conditions,
    batch_of,
    measure_latency,
    measure_peak_memory,
    one_at_a_time,
    time_call,
)


def test_a_latency_tells_how_it_was_measured_and_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout()).train()
    threads = torch.get_num_threads()
    latency = measure_latency(model, (torch.zeros(2, 8),), Conditions(3, "bfloat16", 2), repeats=5, rounds=2)
    assert latency.to_json().keys() == {
        "median_ms", "spread_ms", "least_ms", "batch", "threads", "device", "dtype"
    }  # fmt: skip
    assert 0 < latency.least_ms <= latency.median_ms
    assert latency.spread_ms >= 0
    assert (latency.batch, latency.threads, latency.device, latency.dtype) == (3, 2, "cpu", "bfloat16")
    assert model.training
    assert model[0].weight.dtype == torch.float32
    assert torch.get_num_threads() == threads


def test_the_batch_is_the_one_that_was_asked_for_whatever_the_example_has():
    seen = []

    class Watched(nn.Module):
        def forward(self, x, ids, scale):
            seen.append((x.shape, x.dtype, ids.shape, ids.dtype, scale.shape))
            return x

    inputs = (torch.zeros(2, 3), torch.zeros(2, 5, dtype=torch.long), torch.ones(4))
    measure_latency(Watched(), inputs, Conditions(7, "bfloat16"), repeats=1, rounds=1)
    assert set(seen) == {((7, 3), torch.bfloat16, (7, 5), torch.int64, (4,))}
    assert batch_of(inputs, Conditions(1))[0].shape == (1, 3)


@pytest.mark.parametrize(("repeats", "rounds"), [(0, 1), (1, 0)])
def test_no_pass_at_all_is_refused(repeats, rounds):
    with pytest.raises(ValueError, match="must be at least 1"):
        measure_latency(nn.Identity(), (torch.zeros(1),), Conditions(), repeats=repeats, rounds=rounds)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"threads": 0}, {"dtype": "int8"}])
def test_conditions_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Conditions(**wrong)


def test_the_round_with_the_lowest_median_is_returned_and_the_least_pass_of_all(monkeypatch):
    # Of each round two passes prepare, one warms up, and one is timed: 9 - 0, 8 - 0 and 6 - 0 here.
    ticks = iter([0, 1, 0, 1, 0, 1, 0, 9, 0, 1, 0, 1, 0, 1, 0, 8, 0, 1, 0, 1, 0, 1, 0, 6])
    monkeypatch.setattr(timing, "_clock", lambda device: lambda: next(ticks) / 1000)
    monkeypatch.setattr(timing, "_ROUND_MS", 1e9)
    latency = measure_latency(nn.Identity(), (torch.zeros(1, 1),), Conditions(), repeats=1, rounds=3)
    assert (latency.median_ms, latency.least_ms) == (6.0, 6.0)


def test_one_thread_on_the_cpu_is_timed_by_its_own_clock():
    with devices_device.threads(1):
        assert time_call(lambda: time.sleep(0.01), "cpu", samples=2) < 0.009
    with devices_device.threads(2):
        assert time_call(lambda: time.sleep(0.01), "cpu", samples=2) >= 0.009


def test_two_measurements_wait_for_each_other(tmp_path):
    order, lock = [], tmp_path / "cache" / "lock"

    def measure():
        with one_at_a_time(lock):
            order.append("second")

    with one_at_a_time(lock):
        other = threading.Thread(target=measure)
        other.start()
        time.sleep(0.05)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    with one_at_a_time(None), one_at_a_time(None):
        pass


def test_peak_memory_is_measured_on_cuda_alone(monkeypatch):
    model, inputs = nn.Linear(8, 4), (torch.zeros(2, 8),)
    assert measure_peak_memory(model, inputs, Conditions()) is None
    peaks = {"allocated": 1000, "peak": 5000, "resets": 0}
    monkeypatch.setattr(timing, "_prepared", lambda model, conditions: model)
    monkeypatch.setattr(timing, "batch_of", lambda inputs, conditions: inputs)
    for name, value in (
        ("synchronize", lambda device: None),
        ("memory_allocated", lambda device: peaks["allocated"]),
        ("max_memory_allocated", lambda device: peaks["peak"]),
        ("reset_peak_memory_stats", lambda device: peaks.update(resets=peaks["resets"] + 1)),
    ):
        monkeypatch.setattr(torch.cuda, name, value)
    assert measure_peak_memory(model, inputs, Conditions(device="cuda")) == 4000 + 2 * 8 * 4
    assert peaks["resets"] == 1


def test_float32_is_float32_on_a_gpu_too_and_what_the_user_had_set_comes_back():
    """The switches are those of the process, so they can be watched without a GPU."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        for value in (True, False):
            products.allow_tf32 = convolutions.allow_tf32 = value
            with ieee("cpu"):
                assert (products.allow_tf32, convolutions.allow_tf32) == (value, value)
            with pytest.raises(RuntimeError, match="stop"):
                stopped_within()
            assert (products.allow_tf32, convolutions.allow_tf32) == (value, value)
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


@pytest.mark.parametrize(
    "choice",
    [
        "",
        "torch.set_float32_matmul_precision('high')",
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
        "torch.backends.cudnn.conv.fp32_precision = 'tf32'",
        "torch.set_float32_matmul_precision('high'); torch.backends.fp32_precision = 'tf32'",
        "torch.backends.cudnn.allow_tf32 = False; torch.backends.fp32_precision = 'tf32'",
    ],
)
def test_float32_is_float32_by_whichever_names_a_process_has_chosen_before(choice):
    """torch refuses the older names beside the newer; in a process of its own, as a choice cannot be taken back."""
    code = f"""
import torch
from autoprune.network.devices.device import ieee
operators = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
chosen = lambda: [operator.fp32_precision for operator in operators]
def older():
    try:
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    except RuntimeError:
        return "refused"
{choice}
before = chosen(), older()
with ieee("cuda:0"):
    assert "tf32" not in chosen(), chosen()
    with ieee("cuda:0"):
        assert "tf32" not in chosen(), chosen()
    assert "tf32" not in chosen(), chosen()
after = chosen(), older()
assert after == before, (before, after)
print("same")
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert found.stdout == "same\n", found.stderr


def stopped_within():
    with ieee("cuda:0"):
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        raise RuntimeError("stop")
