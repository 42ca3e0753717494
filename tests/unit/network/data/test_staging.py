"""Batches on their way to a device, with a lane that notes in which order things happen."""

from dataclasses import replace

import pytest
import torch
from torch.utils.data import TensorDataset

from autoprune.network.data import samples, staging
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.data.staging import AHEAD, lane_to, staged


class NotedLane:
    """Copies at once and notes what a GPU would be asked for."""

    def __init__(self):
        self.log = []
        self.sent = 0

    def send(self, batch):
        self.log.append(("send", self.sent))
        self.sent += 1
        return tuple(value.clone() for value in batch)

    def mark(self):
        number = self.sent - 1
        return lambda: self.log.append(("wait", number))


def batches(count):
    return [(torch.full((2, 3), float(i)), torch.full((2,), i)) for i in range(count)]


def test_at_most_two_batches_are_on_the_device_before_the_host_waits_for_the_work_on_the_first():
    lane, found = NotedLane(), []
    for x, y in staged(batches(5), lane):
        found.append(int(y[0]))
        lane.log.append(("work", found[-1]))
        assert float(x[0, 0]) == found[-1]
    assert found == [0, 1, 2, 3, 4]
    assert AHEAD == 2
    expected = [("send", 0), ("work", 0), ("send", 1), ("work", 1)]
    for number in (2, 3, 4):
        expected += [("wait", number - 2), ("send", number), ("work", number)]
    assert lane.log == expected


def test_batches_are_read_one_at_a_time_and_no_further_than_asked_for():
    read = []

    def loader():
        for batch in batches(9):
            read.append(int(batch[1][0]))
            yield batch

    sent = staged(loader(), NotedLane())
    next(sent)
    next(sent)
    sent.close()
    assert read == [0, 1]


def test_where_memory_is_shared_the_very_batches_of_the_loader_are_handed_on():
    given = batches(3)
    assert lane_to("cpu") is None
    assert all(a is b for a, b in zip(given, staged(given, None), strict=True))


def test_an_error_of_the_loader_comes_out_as_it_is():
    def loader():
        yield batches(1)[0]
        raise ValueError("an image cannot be read")

    sent = staged(loader(), NotedLane())
    next(sent)
    with pytest.raises(ValueError, match="cannot be read"):
        next(sent)


def test_a_pool_that_would_fill_a_device_is_sent_to_it_batch_by_batch(monkeypatch):
    images = torch.arange(12.0).reshape(12, 1)
    pool = samples.Pool(images, torch.arange(12))
    split = samples.TensorSplit(pool, torch.arange(2, 10), samples.Transform(), 12)
    lane, size = NotedLane(), images.nbytes + pool.targets.nbytes
    monkeypatch.setattr(samples, "lane_to", lambda device: lane)
    monkeypatch.setattr(samples, "_room", lambda device: 2 * size - 1)
    assert pool.on("meta")[0] is images
    sent = list(split.batches(3, device="meta"))
    assert lane.sent == len(sent) == 3
    assert torch.equal(torch.cat([x for x, _ in sent]), images[2:10])
    assert torch.equal(torch.cat([y for _, y in sent]), torch.arange(2, 10))
    monkeypatch.setattr(samples, "_room", lambda device: 2 * size)
    resident = replace(split, pool=samples.Pool(images, pool.targets))
    assert next(resident.batches(3, device="meta"))[0].is_meta
    assert lane.sent == 3


def test_the_room_for_a_pool_is_what_this_process_may_take_of_a_shared_device(monkeypatch):
    for name, value in (
        ("mem_get_info", (50, 80)),
        ("memory_allocated", 5),
        ("memory_reserved", 9),
        ("get_per_process_memory_fraction", 1.0),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert samples._room("cuda") == 50 + 4  # what is free, and what this process keeps for itself
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.225)
    assert samples._room("cuda") == 18 - 5


def test_a_pool_that_left_a_device_is_copied_there_again_when_asked(monkeypatch):
    monkeypatch.setattr(samples, "_room", lambda device: 10**6)
    pool = samples.Pool(torch.zeros(4, 3), torch.arange(4))
    first = pool.on("meta")
    assert pool.on("meta") is first
    pool.leave()
    assert pool.on("meta") is not first


def test_a_streamed_split_sends_every_batch_through_the_lane_and_augments_as_without_one(monkeypatch):
    lane = NotedLane()
    monkeypatch.setattr(staging, "AHEAD", 3)
    x = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settings = DataSettings(calibration=4, flip=True, crop_padding=1)
    train = as_splits({"train": TensorDataset(x, torch.arange(40) % 2)}, settings=settings).train

    def passed():
        order = torch.Generator().manual_seed(3)
        return [image for image, _ in train.batches(8, shuffle=order, augment=True)]

    plain = passed()
    monkeypatch.setattr(samples, "lane_to", lambda device: lane)
    assert all(torch.equal(a, b) for a, b in zip(plain, passed(), strict=True))
    assert lane.sent == len(plain)
