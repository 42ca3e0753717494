"""Calibration statistics: moments of exactly the patches that layers read."""

import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autoprune.errors import DataError
from autoprune.network.calibration.moments import gather, products, refittable, sample_patches
from autoprune.network.tracing.trace import trace


def images(count=12, size=7):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def generator():
    return torch.Generator().manual_seed(0)


def test_patches_times_weights_are_the_layers_output(convolution_options):
    layer, x = nn.Conv2d(3, 6, 3, bias=False, **convolution_options), images(2)
    rows = sample_patches(layer, x, 10**6, generator())  # (G, rows, d)
    weight = layer.weight.detach().reshape(rows.shape[0], -1, rows.shape[2])
    found = torch.cat(list((rows @ weight.transpose(1, 2)).unbind(0)), 1)  # (rows, N)
    expected = layer(x).detach().movedim(1, -1).reshape(-1, 6)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [1, 3])
def test_patches_of_other_ranks_are_right_too(rank):
    layer = getattr(nn, f"Conv{rank}d")(2, 4, 3, stride=2, padding=1, bias=False)
    x = torch.randn(2, 2, *[5] * rank)
    rows = sample_patches(layer, x, 10**6, generator())
    expected = layer(x).detach().movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(rows[0] @ layer.weight.detach().reshape(4, -1).T, expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [5, 255, 256, 301, 2049])
def test_products_are_the_whole_gram_matrix_however_many_threads_there_are(threads, number, groups, size):
    threads(number)
    rows = torch.randn(groups, 20, size, generator=generator())
    torch.testing.assert_close(products(rows), rows.transpose(1, 2) @ rows)
    assert products(rows[:, :0]).count_nonzero() == 0


def test_one_thread_means_one_thread_of_numpy_too(threads):
    threads(1)
    rows = torch.randn(1, 4096, 512, generator=generator())
    products(rows)
    begun, worked = time.perf_counter(), time.process_time()  # a process's time is that of all of its threads
    for _ in range(5):
        products(rows)
    assert time.process_time() - worked < 1.5 * (time.perf_counter() - begun)


@pytest.mark.parametrize("options", [{"padding": "same", "kernel_size": 2}, {"padding": 2, "kernel_size": 3}], ids=str)
def test_patches_do_not_depend_on_how_the_images_lie_in_memory_or_on_their_type(options):
    layer, x = nn.Conv2d(3, 6, bias=False, **options), images(2).bfloat16()
    plain = sample_patches(layer, x, 50, generator())
    assert plain.dtype == torch.float32
    assert torch.equal(plain, sample_patches(layer, x.contiguous(memory_format=torch.channels_last), 50, generator()))
    assert torch.equal(plain, sample_patches(layer, x.float(), 50, generator()))


def test_a_sample_of_patches_is_drawn_without_repetition_and_follows_the_generator():
    layer = nn.Linear(2, 3)
    x = torch.arange(40.0).reshape(4, 5, 2)
    rows = sample_patches(layer, x, 7, generator())
    assert rows.shape == (1, 7, 2)
    assert len(rows[0].unique(dim=0)) == 7
    assert torch.equal(rows, sample_patches(layer, x, 7, generator()))


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.Conv2d(8, 6, 3, padding=1, groups=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


def test_only_layers_that_mix_prunable_channels_are_refittable():
    assert set(refittable(trace(net(), images(2)))) == {"3", "7"}


def test_moments_are_those_of_all_patches_where_they_fit():
    network, x = trace(net(), images(2)), images()
    statistics = gather(network, [x[:5], x[5:]])
    with torch.no_grad():
        hidden = network.model[:3](x)
        patches = F.unfold(hidden, 3, padding=1).transpose(1, 2).reshape(-1, 2, 36)
    moments = statistics["3"]
    assert (moments.rows, moments.kernel, tuple(moments.gram.shape)) == (12 * 49, 9, (2, 36, 36))
    torch.testing.assert_close(moments.mean, patches.mean(0), atol=1e-5, rtol=1e-4)
    gram = torch.einsum("rgd,rge->gde", patches, patches) / len(patches)
    torch.testing.assert_close(moments.gram, gram, atol=1e-5, rtol=1e-4)
    centred = patches - patches.mean(0)
    covariance = torch.einsum("rgd,rge->gde", centred, centred) / len(patches)
    torch.testing.assert_close(moments.covariance(), covariance, atol=1e-5, rtol=1e-3)


def test_the_number_of_patches_is_bounded_and_drawn_by_the_seed():
    network = trace(net(), images(2))
    first = gather(network, [images()], max_rows=50, seed=3)["3"]
    assert first.rows == 50
    assert torch.equal(first.gram, gather(network, [images()], max_rows=50, seed=3)["3"].gram)
    assert not torch.equal(first.gram, gather(network, [images()], max_rows=50, seed=4)["3"].gram)


def test_gathering_leaves_no_hook_and_no_mode_behind():
    model = net()
    network = trace(model, images(2))
    model.train()
    gather(network, [images()])
    assert all(not m._forward_pre_hooks and m.training for m in model.modules())


def test_no_images_at_all_are_refused():
    with pytest.raises(DataError, match="no calibration images"):
        gather(trace(net(), images(2)), [])


def test_activations_that_are_not_finite_are_refused_by_the_name_of_the_layer():
    x = images()
    x[0, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="the input of 3 is not finite"):
        gather(trace(net(), images(2)), [x])


def test_batches_that_come_one_at_a_time_give_the_same_moments_as_a_list():
    network, x = trace(net(), images(2)), images()
    listed = gather(network, [x[:5], x[5:10], x[10:]], max_rows=90)
    streamed = gather(network, (part for part in (x[:5], x[5:10], x[10:])), max_rows=90, number=3)
    assert listed.keys() == streamed.keys()
    assert all(torch.equal(listed[path].gram, streamed[path].gram) for path in listed)


def test_patches_are_read_in_parts_that_keep_the_bound_and_add_up_to_the_same(monkeypatch):
    network = trace(net(), images(2))
    whole = gather(network, [images()])
    held = []

    def counted(rows):
        held.append(rows.nbytes)
        return products(rows)

    monkeypatch.setattr("autoprune.network.calibration.moments.PATCH_BYTES", 5000)
    monkeypatch.setattr("autoprune.network.calibration.moments.products", counted)
    parts = gather(network, [images()])
    assert len(held) > 3 * len(parts)
    assert max(held) <= 5000
    for path, moments in whole.items():
        assert parts[path].rows == moments.rows
        torch.testing.assert_close(parts[path].gram, moments.gram)
        torch.testing.assert_close(parts[path].mean, moments.mean)
