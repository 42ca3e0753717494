"""A folder as ImageNet has it, too large to hold: epochs stream in the same memory, and decoding runs ahead.

Everything is measured in a process of its own: under pytest the resident size moves by itself.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the resident size is read from /proc"),
]
MIB = 2**20
CLASSES = ("n01440764", "n01443537", "n01484850")

GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1"}
"""Lets glibc give back what is freed at once, so that the resident size is what is held. Without it batches lie in a
heap that grew by 10 MiB an epoch until the seventh of ten, and then no more (one run)."""

PROGRAM = """
import gc, json, multiprocessing, os, sys, time
import torch
from autoprune.network.data import folders
from autoprune.network.data.loading import DataSettings, load_data
from autoprune.network.training.evaluation import evaluate
from autoprune.network.data.samples import StreamSplit
from dataclasses import replace
from pathlib import Path

folders.MEMORY_LIMIT = 2**20
read = multiprocessing.Value("q", 0)
plain = folders.ImageFiles.__getitem__

def counted(self, position):
    with read.get_lock():
        read.value += 1
    return plain(self, position)

folders.ImageFiles.__getitem__ = counted

def resident():
    gc.collect()
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

torch.set_num_threads(1)
settings = DataSettings(name="imagefolder", path=sys.argv[1], size=160, calibration=6, flip=True, crop_padding=4)
cache = Path(sys.argv[2])
splits = load_data(settings, seed=0, cache_dir=cache)
assert isinstance(splits.train, StreamSplit)
train, val = (replace(split, workers=2) for split in (splits.train, splits.val))
order = torch.Generator().manual_seed(0)
said = {"train": len(train), "sizes": [], "seen": [], "cached": cache.exists()}

for epoch in range(int(sys.argv[3])):
    seen = 0
    for x, y in train.batches(16, shuffle=order, augment=True):
        assert x.shape[1:] == (3, 160, 160) and x.dtype == torch.float32
        seen += len(y)
    said["seen"].append(seen)
    said["sizes"].append(resident())

before = read.value
batches = train.batches(4, shuffle=order, augment=True)
next(batches)
said["children"] = len(multiprocessing.active_children())
end = time.monotonic() + 60
while read.value - before < 12 and time.monotonic() < end:  # nothing more is asked for
    time.sleep(0.05)
said["ahead"] = read.value - before
batches.close()
del batches

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten(), torch.nn.Linear(48, 3))
said["scores"] = [evaluate(model, val, batch_size=4, limit=9).loss for _ in range(3)]
said["left"] = len(multiprocessing.active_children())
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JPEG files of different sizes, 210 in all."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("imagenet")
    for part, count in (("train", 60), ("val", 10)):
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = (int(side) for side in rng.integers(170, 280, 2))
                pixels = rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((width, height)).save(folder / f"{name}_{number}.JPEG")
    return root


@pytest.fixture(scope="module")
def said(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    cache = tmp_path_factory.mktemp("empty") / "cache"
    command = [sys.executable, "-W", "error", "-c", PROGRAM, str(photographs), str(cache), "8"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**os.environ, **GIVING_BACK}, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_epoch_reads_every_image_and_none_is_kept(said: dict) -> None:
    assert said["seen"] == [said["train"]] * 8
    assert not said["cached"]


def test_the_process_does_not_grow_over_epochs(said: dict) -> None:
    """Six epochs that stayed in memory would be 66 MiB as bytes, 260 MiB in float32."""
    sizes = said["sizes"]
    assert max(sizes[2:]) - sizes[1] < 8 * MIB, [size / MIB for size in sizes]


def test_images_are_decoded_in_other_processes_ahead_of_what_is_asked_for(said: dict) -> None:
    assert said["children"] == 2
    assert said["ahead"] >= 12  # one batch of 4 was asked for
    assert said["left"] == 0


def test_the_same_images_are_scored_each_time(said: dict) -> None:
    assert len(set(said["scores"])) == 1
