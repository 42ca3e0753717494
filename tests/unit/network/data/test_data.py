"""Data sets, splits and batches."""

import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Generator
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from autoprune.errors import DataError
from autoprune.network.data import folders, samples
from autoprune.network.data.loading import DataSettings, Splits, as_splits, load_data
from autoprune.network.data.samples import StreamSplit, TensorSplit, Transform
from autoprune.network.models.torchvision import import_torchvision

PARTS = ("train", "calibration", "val", "test")


def parts(splits):
    return {name: getattr(splits, name) for name in PARTS}


def whole(split, **arguments):
    batches = list(split.batches(64, **arguments))
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


def labelled(n, classes=3, *, seed=0, dtype=torch.uint8):
    """Images whose first two pixels spell the number of the sample."""
    x = torch.zeros(n, 1, 4, 4, dtype=dtype)
    x[:, 0, 0, 0] = torch.arange(n) % 256
    x[:, 0, 0, 1] = torch.arange(n) // 256
    return x, torch.arange(n) % classes


def numbers(split):
    x, _ = whole(split)
    raw = (x * 255).round().long()
    return (raw[:, 0, 0, 0] + 256 * raw[:, 0, 0, 1]).tolist()


RAW = DataSettings(mean=(0.0,), std=(1.0,))


# Splits


def test_digits_are_split_into_four_parts_of_every_class(tmp_path):
    splits = load_data(DataSettings(name="digits", calibration=200), seed=0, cache_dir=tmp_path)
    assert {name: len(split) for name, split in parts(splits).items()} == {
        "train": 1022,
        "calibration": 200,
        "val": 216,
        "test": 359,
    }
    assert splits.num_classes == 10
    assert splits.sample_shape == (1, 8, 8)
    for split in parts(splits).values():
        counts = torch.bincount(whole(split)[1], minlength=10).double()
        assert counts.min() > 0.8 * counts.mean()


def test_the_splits_are_disjoint_and_complete():
    splits = as_splits({"train": labelled(600)}, settings=RAW, seed=0)
    found = [number for split in parts(splits).values() for number in numbers(split)]
    assert sorted(found) == list(range(600))


def test_the_seed_alone_decides_the_splits():
    first, again, other = (as_splits({"train": labelled(600)}, settings=RAW, seed=s) for s in (0, 0, 1))
    for name in PARTS:
        assert numbers(getattr(first, name)) == numbers(getattr(again, name))
        assert numbers(getattr(first, name)) != numbers(getattr(other, name))


def test_a_larger_calibration_set_moves_neither_validation_nor_test():
    small, large = (
        as_splits({"train": labelled(600)}, settings=DataSettings(mean=(0.0,), std=(1.0,), calibration=n))
        for n in (10, 100)
    )
    assert numbers(small.val) == numbers(large.val)
    assert numbers(small.test) == numbers(large.test)


def test_every_prefix_of_a_split_holds_the_classes_in_proportion():
    splits = as_splits({"train": labelled(3000, classes=5)}, settings=RAW)
    _, y = whole(splits.train, limit=100)
    assert torch.bincount(y, minlength=5).tolist() == pytest.approx([20] * 5, abs=2)


def test_given_parts_are_kept_and_only_the_missing_ones_carved():
    x, y = labelled(300)
    data = {"train": (x[:200], y[:200]), "val": (x[200:250], y[200:250]), "test": (x[250:], y[250:])}
    splits = as_splits(data, settings=RAW)
    assert sorted(numbers(splits.val)) == list(range(200, 250))
    assert sorted(numbers(splits.test)) == list(range(250, 300))
    assert sorted(numbers(splits.train) + numbers(splits.calibration)) == list(range(200))
    assert len(splits.calibration) == 50


def test_splits_pass_through_unchanged():
    splits = as_splits({"train": labelled(300)})
    assert as_splits(splits) is splits
    assert isinstance(splits, Splits)


# Batches


def test_images_come_normalised_and_channels_last_and_classes_as_int64():
    splits = load_data(DataSettings(name="digits"), seed=0, cache_dir=Path("unused"))
    x, y = next(splits.train.batches(32))
    assert x.dtype == torch.float32
    assert y.dtype == torch.int64
    assert x.is_contiguous(memory_format=torch.channels_last)
    x, _ = whole(splits.train)
    assert x.mean().item() == pytest.approx(0, abs=1e-3)
    assert x.std().item() == pytest.approx(1, abs=1e-2)


def test_tables_are_standardised_feature_by_feature_with_training_statistics():
    splits = load_data(DataSettings(name="iris"), seed=0, cache_dir=Path("unused"))
    assert splits.sample_shape == (4,)
    x, _ = whole(splits.train)
    assert x.mean(0).abs().max() < 1e-5
    assert (x.std(0, correction=0) - 1).abs().max() < 1e-4
    assert whole(splits.test)[0].mean(0).abs().max() > 1e-3


def test_given_mean_and_std_are_in_units_of_white():
    x = torch.full((40, 2, 3, 3), 255, dtype=torch.uint8)
    settings = DataSettings(mean=(0.5, 0.0), std=(0.25, 2.0))
    splits = as_splits({"train": (x, torch.arange(40) % 2)}, settings=settings)
    found, _ = next(splits.train.batches(1))
    assert torch.allclose(found[0, :, 0, 0], torch.tensor([2.0, 0.5]))


def test_float_samples_of_the_user_are_left_as_they_are():
    x = torch.rand(60, 3) + 5
    splits = as_splits({"train": (x, torch.arange(60) % 2)})
    assert 5 < whole(splits.train)[0].mean() < 6


def test_shuffling_follows_the_generator_and_limit_takes_the_first():
    splits = as_splits({"train": labelled(300)}, settings=RAW)
    plain = whole(splits.train, limit=50)[0]
    one, same = (whole(splits.train, limit=50, shuffle=Generator().manual_seed(3))[0] for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, plain)
    assert sorted(one[:, 0, 0, 0].tolist()) == sorted(plain[:, 0, 0, 0].tolist())
    generator = Generator().manual_seed(3)
    first, second = (whole(splits.train, shuffle=generator)[0] for _ in range(2))
    assert not torch.equal(first, second)


def test_the_last_batch_holds_the_rest():
    splits = as_splits({"train": labelled(300)}, settings=RAW)
    assert sum(len(x) for x, _ in splits.train.batches(64)) == len(splits.train)


def drawn(transform, x):
    return transform(x, transform.draw(len(x), Generator().manual_seed(0)))


@pytest.mark.parametrize(("flip", "padding"), [(True, 2), (True, 0), (False, 1)])
def test_what_chance_says_is_the_same_drawn_a_batch_at_a_time_and_for_a_whole_epoch(flip, padding):
    """A GPU gets all of it by one copy; its images are those of the CPU."""
    transform, sizes = Transform(flip=flip, crop_padding=padding), [4, 4, 3]
    here = list(transform.draws(sizes, Generator().manual_seed(1), "cpu"))
    there = list(transform.draws(sizes, Generator().manual_seed(1), "meta"))
    assert len(here) == len(there) == 3
    moved = list(samples._moved(here, sizes, "cpu"))
    for n, draws, same, far in zip(sizes, here, moved, there, strict=True):
        for name, shape in (("shifts", (2, n)), ("mirrored", (n,))):
            first, second, third = (getattr(d, name) for d in (draws, same, far))
            if (name == "shifts" and padding) or (name == "mirrored" and flip):
                assert first.shape == third.shape == shape
                assert torch.equal(first, second)
                assert third.device.type == "meta"
            else:
                assert first is second is third is None


def test_augmentation_flips_half_of_the_images_and_shifts_all_within_the_padding():
    x = torch.zeros(2000, 1, 5, 5, dtype=torch.uint8)
    x[:, 0, 2, 1] = 255
    flipped = drawn(Transform(flip=True), x)
    assert flipped[:, 0, 2, 3].mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(flipped.sum((1, 2, 3)), torch.ones(2000))
    moved = drawn(Transform(crop_padding=1), x)
    assert torch.equal(moved[:, 0, 1:4, 0:3].sum((1, 2)), torch.ones(2000))
    assert (moved.mean(0)[0, 1:4, 0:3] - 1 / 9).abs().max() < 0.03


def test_without_augmentation_images_stay_as_they_are():
    settings = DataSettings(mean=(0.0,), std=(1.0,), flip=True, crop_padding=2)
    splits = as_splits({"train": labelled(300)}, settings=settings)
    assert sorted(numbers(splits.val)) == sorted(numbers(as_splits({"train": labelled(300)}, settings=RAW).val))
    shuffled = whole(splits.train, shuffle=Generator().manual_seed(0), augment=True)[0]
    assert shuffled[:, 0, 0].sum() < whole(splits.train)[0][:, 0, 0].sum()


def test_bad_batch_requests_are_refused():
    split = as_splits({"train": labelled(300)}).train
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        split.batches(0)
    with pytest.raises(ValueError, match="augment needs"):
        split.batches(8, augment=True)


def test_splits_survive_pickling():
    splits = as_splits({"train": labelled(300)}, settings=RAW)
    numbers(splits.train)
    assert numbers(pickle.loads(pickle.dumps(splits)).train) == numbers(splits.train)


# Data of the user's own


class Numbers(Dataset):
    def __init__(self, n):
        self.x, self.y = labelled(n)

    def __len__(self):
        return len(self.y)

    def __getitem__(self, position):
        return self.x[position], int(self.y[position])


class Pictures(Numbers):
    def __getitem__(self, position):
        return Image.fromarray(self.x[position, 0].numpy()), int(self.y[position])


class Endless(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("kind", [Numbers, Pictures])
def test_a_dataset_is_streamed_and_gives_the_same_splits_as_its_tensors(kind):
    streamed = as_splits({"train": kind(300)}, settings=RAW)
    held = as_splits({"train": labelled(300)}, settings=RAW)
    assert isinstance(streamed.train, StreamSplit)
    for name, split in parts(streamed).items():
        inline = StreamSplit(split.dataset, split.index, split.transform, split.num_classes, workers=0)
        assert numbers(inline) == numbers(getattr(held, name))


def test_worker_processes_read_the_same_batches():
    split = as_splits({"train": Numbers(60)}, settings=RAW).train
    with_worker, without = (
        StreamSplit(split.dataset, split.index, split.transform, split.num_classes, workers=n) for n in (1, 0)
    )
    assert numbers(with_worker) == numbers(without)


def test_tensors_and_datasets_may_be_mixed():
    splits = as_splits({"train": Numbers(90), "test": labelled(30)}, settings=RAW)
    assert len(splits.test) == 30
    assert splits.num_classes == 3


def test_a_factory_may_return_a_mapping_of_arrays(monkeypatch, tmp_path):
    (tmp_path / "own_data_of_the_test.py").write_text(
        "import numpy as np\n"
        "def make():\n    return {'train': (np.random.default_rng(0).normal(size=(80, 5)), np.arange(80) % 4)}\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    splits = load_data(DataSettings(factory="own_data_of_the_test:make"), seed=0, cache_dir=tmp_path)
    assert splits.sample_shape == (5,)
    assert splits.num_classes == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1, 2], "not list"),
        ({"test": labelled(9)}, "no 'train' part"),
        ({"train": labelled(9), "tests": labelled(9)}, "did you mean 'test'"),
        ({"train": labelled(9)[0]}, "pair"),
        ({"train": (torch.zeros(4), torch.zeros(4).long())}, "two dimensions"),
        ({"train": (torch.zeros(4, 2), torch.zeros(3).long())}, "4 samples but targets of shape"),
        ({"train": (torch.zeros(4, 2), torch.tensor([0, 1, -1, 0]))}, "integers from 0"),
        ({"train": (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 0, 1]))}, "not finite"),
        ({"train": (torch.zeros(0, 2), torch.zeros(0).long())}, "empty"),
        ({"train": (torch.zeros(9, 2), torch.arange(9) % 2 * 2)}, "class '1' has no training sample"),
        ({"train": (torch.zeros(9, 2), torch.zeros(9).long())}, "only one class"),
        ({"train": Endless()}, "IterableDataset"),
        ({"train": labelled(60), "test": (torch.zeros(4, 2), torch.arange(4) % 3)}, "different shapes"),
        ({"train": (torch.zeros(40, 32, 32, 3, dtype=torch.uint8), torch.arange(40) % 2)}, "looks like NHWC"),
        ({"train": TensorDataset(torch.zeros(4, 2), torch.zeros(4).long())}, "only one class"),
        ({"train": (torch.zeros(4, 2), torch.tensor([0, 1, torch.nan, 0]))}, "targets hold values that are not finite"),
        ({"train": (torch.zeros(2, 2), torch.tensor([0, 1e300], dtype=torch.float64))}, "not finite in float32"),
        ({"train": (torch.zeros(2, 2), torch.zeros(2, dtype=torch.complex64))}, "not complex"),
        ({"train": (torch.zeros(2, 2), ["cat", "dog"])}, "train: targets must be numbers, not list"),
        ({"train": (torch.zeros(2, 2), torch.tensor(1.0))}, r"2 samples but targets of shape \(\)"),
        ({"train": (torch.zeros(4, 2), torch.zeros(4)), "val": (torch.zeros(4, 2), torch.zeros(4).long())}, "types"),
        ({"train": (torch.zeros(4, 2), torch.zeros(4)), "val": (torch.zeros(4, 2), torch.zeros(4, 1))}, "or shapes"),
        ({"train": TensorDataset(torch.zeros(4, 2), torch.full((4,), torch.inf))}, "not finite"),
    ],
)
def test_data_that_cannot_be_used_is_refused_in_plain_words(data, message):
    with pytest.raises(DataError, match=message):
        as_splits(data)


# Targets that are no classes


def measured(n, shape=(), dtype=torch.float32):
    """Images that spell their number, and targets that hold it too."""
    x, _ = labelled(n)
    return x, torch.arange(n).reshape(n, *[1] * len(shape)).expand(n, *shape).to(dtype)


TARGETS = [
    ((), torch.float64, torch.float32),
    ((1,), torch.float16, torch.float32),
    ((2, 3), torch.float32, torch.float32),
    ((1,), torch.int32, torch.int64),
    ((4, 4), torch.int16, torch.int64),
]


@pytest.mark.parametrize(("shape", "dtype", "given_out"), TARGETS)
def test_targets_that_are_no_classes_are_handed_on_beside_their_samples(shape, dtype, given_out):
    splits = as_splits({"train": measured(300, shape, dtype)}, settings=RAW)
    assert (splits.classes, splits.num_classes) == ((), 0)
    for split in parts(splits).values():
        _, y = whole(split)
        assert split.num_classes == 0
        assert y.dtype == given_out
        assert y.shape[1:] == shape
        assert y.flatten(1).float().mean(1).tolist() == numbers(split) if shape else y.tolist() == numbers(split)
    assert sorted(number for split in parts(splits).values() for number in numbers(split)) == list(range(300))


def test_targets_that_are_no_classes_are_split_by_the_seed_alone():
    first, again, other = (as_splits({"train": measured(300)}, settings=RAW, seed=s) for s in (0, 0, 1))
    for name in PARTS:
        assert numbers(getattr(first, name)) == numbers(getattr(again, name))
        assert sorted(numbers(getattr(first, name))) != sorted(numbers(getattr(other, name)))
    assert {name: len(split) for name, split in parts(first).items()} == {
        "train": 153,
        "calibration": 51,
        "val": 36,
        "test": 60,
    }


def test_a_mask_may_hold_a_number_that_means_nothing():
    mask = torch.full((60, 4, 4), -100)
    _, y = whole(as_splits({"train": (torch.rand(60, 1, 4, 4), mask)}).train)
    assert y.unique().tolist() == [-100]


class Measured(Dataset):
    """Reads a sample at a time, and counts how often."""

    def __init__(self, x, y, wrap=lambda target: target):
        self.x, self.y, self.wrap, self.reads = x, y, wrap, 0

    def __len__(self):
        return len(self.y)

    def __getitem__(self, position):
        self.reads += 1
        return self.x[position], self.wrap(self.y[position])


def inline(split):
    return StreamSplit(split.dataset, split.index, split.transform, split.num_classes, workers=0)


@pytest.mark.parametrize(
    ("shape", "dtype", "wrap"),
    [
        ((), torch.float32, float),
        ((), torch.float32, np.float64),
        ((2,), torch.float32, list),
        ((4, 4), torch.int64, lambda mask: mask),
        ((4, 4), torch.uint8, lambda mask: Image.fromarray(mask.numpy())),
    ],
    ids=["number", "numpy number", "list", "mask", "picture"],
)
def test_the_first_sample_of_a_dataset_tells_that_its_targets_are_no_classes(shape, dtype, wrap):
    x, y = measured(200, shape, dtype)
    held = as_splits({"train": (x, y.float() if dtype == torch.float32 else y.long())}, settings=RAW)
    dataset = Measured(x, y, wrap)
    streamed = as_splits({"train": dataset}, settings=RAW)
    assert dataset.reads <= 3  # a large data set is not read through
    assert (streamed.classes, streamed.num_classes) == ((), 0)
    for name in PARTS:
        x, y = whole(inline(getattr(streamed, name)))
        expected_x, expected_y = whole(getattr(held, name))
        assert torch.equal(x, expected_x)
        assert torch.equal(y, expected_y)
        assert y.dtype == expected_y.dtype


def test_datasets_and_tensors_without_classes_may_be_mixed():
    data = {"train": Measured(*measured(100, (2,))), "test": measured(20, (2,), torch.float64)}
    splits = as_splits(data, settings=RAW)
    assert whole(inline(splits.test))[1][:, 0].tolist() == numbers(inline(splits.test))
    with pytest.raises(DataError, match="different types or shapes"):
        as_splits({**data, "test": labelled(20)})


def test_a_target_that_is_not_finite_is_found_when_a_dataset_is_read():
    x, y = measured(100)
    y[50] = torch.nan
    splits = as_splits({"train": Measured(x, y)}, settings=RAW)
    with pytest.raises(DataError, match="not finite"):
        [whole(inline(split)) for split in parts(splits).values()]


@pytest.mark.parametrize("fields", [{"flip": True}, {"crop_padding": 2}, {"size": 2}])
def test_images_are_not_moved_away_from_their_masks(fields):
    settings = DataSettings(mean=(0.0,), std=(1.0,), **fields)
    with pytest.raises(DataError, match=f"{next(iter(fields))} would move the images but not their targets"):
        as_splits({"train": measured(60, (4, 4))}, settings=settings)
    assert as_splits({"train": measured(60)}, settings=settings).num_classes == 0


def test_asking_for_more_calibration_samples_than_there_are_is_refused_with_a_number_that_works():
    with pytest.raises(DataError, match=r"512 samples were asked for, but only 102 .* at most 25"):
        load_data(DataSettings(name="iris", calibration=512), seed=0, cache_dir=Path("unused"))
    assert len(load_data(DataSettings(name="iris", calibration=25), seed=0, cache_dir=Path("x")).calibration) == 25


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation_source": "other"}, "validation.source"),
        ({"validation_source": "test"}, "validation.match"),
        ({"validation_fraction": 1.0}, "validation.fraction"),
        ({"calibration": 0}, "calibration"),
        ({"mean": (0.0,)}, "given together"),
        ({"mean": (0.0,), "std": (0.0,)}, "positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(DataError, match=message):
        DataSettings(name="digits", **fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (DataSettings(), "either a name or a factory"),
        (DataSettings(name="cifar1O"), "did you mean 'cifar10'"),
        (DataSettings(name="mnist"), r"needs data\.path"),
        (DataSettings(name="imagefolder"), r"needs data\.path"),
        (DataSettings(name="imagefolder", path="nowhere"), "no image folder or archive at nowhere"),
        (DataSettings(name="digits", mean=(0.0,) * 3, std=(1.0,) * 3), "3 and 3 values for 1 channels"),
        (DataSettings(name="iris", size=8), "needs images"),
        (
            DataSettings(name="digits", validation_source="test", validation_match="*"),
            "'imagefolder' alone",
        ),
    ],
)
def test_data_sets_that_cannot_be_loaded_say_why(settings, message, tmp_path):
    with pytest.raises(DataError, match=message):
        load_data(settings, seed=0, cache_dir=tmp_path)


def test_size_resizes_the_shorter_side_and_cuts_the_centre():
    x = torch.zeros(40, 1, 4, 8, dtype=torch.uint8)
    x[:, :, :, 2:6] = 255
    settings = DataSettings(size=2, mean=(0.0,), std=(1.0,))
    splits = as_splits({"train": (x, torch.arange(40) % 2)}, settings=settings)
    assert splits.sample_shape == (1, 2, 2)
    assert whole(splits.val)[0].min() > 0.7
    assert load_data(DataSettings(name="digits", size=16), seed=0, cache_dir=Path("x")).sample_shape == (1, 16, 16)


# torchvision's own file formats


def write_idx(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.astype(np.uint8).tobytes())
    with gzip.open(path.with_name(path.name + ".gz"), "wb") as stream:
        stream.write(head + array.astype(np.uint8).tobytes())


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion-mnist", "FashionMNIST")])
def test_mnist_files_are_read(tmp_path, name, folder):
    random = np.random.default_rng(0)
    for part, n in (("train", 100), ("t10k", 30)):
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte", random.integers(0, 256, (n, 28, 28)))
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte", np.arange(n) % 10)
    splits = load_data(DataSettings(name=name, path=str(tmp_path), calibration=20), seed=0, cache_dir=tmp_path)
    assert {key: len(split) for key, split in parts(splits).items()} == {
        "train": 65,
        "calibration": 20,
        "val": 15,
        "test": 30,
    }
    assert splits.sample_shape == (1, 28, 28)
    assert len(splits.classes) == 10


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_are_read(tmp_path, monkeypatch, name):
    classes = 10 if name == "cifar10" else 100
    key = "labels" if name == "cifar10" else "fine_labels"
    builder = getattr(import_torchvision().datasets, name.upper())
    root = tmp_path / builder.base_folder
    root.mkdir()

    def write(file, content):
        data = pickle.dumps(content)
        (root / file).write_bytes(data)
        return [file, hashlib.md5(data).hexdigest()]

    def batch(n):
        return {"data": np.full((n, 3072), 7, dtype=np.uint8), key: [i % classes for i in range(n)]}

    monkeypatch.setattr(builder, "train_list", [write("train_file", batch(4 * classes))])
    monkeypatch.setattr(builder, "test_list", [write("test_file", batch(classes))])
    meta = write("meta_file", {builder.meta["key"]: [f"class {i}" for i in range(classes)]})
    monkeypatch.setattr(builder, "meta", {"filename": meta[0], "key": builder.meta["key"], "md5": meta[1]})
    splits = load_data(
        DataSettings(name=name, path=str(tmp_path), validation_fraction=0.25), seed=0, cache_dir=tmp_path
    )
    assert splits.sample_shape == (3, 32, 32)
    assert len(splits.test) == classes
    assert len(splits.val) == classes
    assert splits.classes[3] == "class 3"


def test_missing_torchvision_files_are_named_and_nothing_is_downloaded_unasked(tmp_path):
    with pytest.raises(DataError, match=r"CIFAR10 cannot be read from .*download: true would fetch it"):
        load_data(DataSettings(name="cifar10", path=str(tmp_path)), seed=0, cache_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


# Image folders and archives


def picture(number, side=6):
    image = np.full((side, side, 3), 0, dtype=np.uint8)
    image[..., 0], image[..., 1] = number % 256, number // 256
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "png")
    return stream.getvalue()


def files(train=12, test=6, second="test"):
    found, number = {}, 0
    for part, n in (("train", train), (second, test)):
        for label in ("cat", "dog"):
            for i in range(n):
                found[f"{part}/{label}/{i:04}.png"] = picture(number)
                number += 1
    return found


def write_folder(root, content):
    for name, data in content.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path, content, *, prefix="", mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


FOLDER = {"name": "imagefolder", "mean": (0.0,) * 3, "std": (1 / 255,) * 3}


def image_numbers(split):
    x, _ = whole(split)
    return (x[:, 0, 0, 0] + 256 * x[:, 1, 0, 0]).round().int().tolist()


def folder_settings(path, **fields):
    return DataSettings(path=str(path), **{**FOLDER, **fields})


@pytest.mark.parametrize("second", ["test", "val"])
def test_a_folder_gives_its_train_images_and_its_test_or_val_images(tmp_path, second):
    root = write_folder(tmp_path / "set", files(second=second))
    (root / "train" / "notes.txt").write_text("no image")
    splits = load_data(folder_settings(root), seed=0, cache_dir=tmp_path / "cache")
    assert splits.classes == ("cat", "dog")
    assert splits.sample_shape == (3, 6, 6)
    assert sorted(image_numbers(splits.test)) == list(range(24, 36))
    rest = image_numbers(splits.train) + image_numbers(splits.calibration) + image_numbers(splits.val)
    assert sorted(rest) == list(range(24))
    x, y = whole(splits.test)
    assert torch.equal((x[:, 0, 0, 0] >= 30).long(), y)


def test_a_val_folder_beside_test_is_the_validation_split(tmp_path):
    content = {**files(), **{f"val/{label}/a.png": picture(100) for label in ("cat", "dog")}}
    splits = load_data(folder_settings(write_folder(tmp_path / "set", content)), seed=0, cache_dir=tmp_path)
    assert image_numbers(splits.val) == [100, 100]
    assert len(splits.test) == 12


@pytest.mark.parametrize(("suffix", "mode"), [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
@pytest.mark.parametrize("prefix", ["", "./", "deep/set/"])
def test_an_archive_gives_the_same_splits_as_its_folder(tmp_path, suffix, mode, prefix):
    root = write_folder(tmp_path / "set", files())
    archive = write_tar(tmp_path / f"set.{suffix}", files(), mode=mode, prefix=prefix)
    one, other = (load_data(folder_settings(p), seed=0, cache_dir=tmp_path / "cache") for p in (root, archive))
    for name in PARTS:
        assert image_numbers(getattr(one, name)) == image_numbers(getattr(other, name))


def test_images_are_decoded_once_and_again_when_the_files_change(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", files())
    archive = write_tar(tmp_path / "set.tar.gz", files())
    decoded = []
    decode = folders._decode
    monkeypatch.setattr(folders, "_decode", lambda *args, **kwargs: decoded.append(args[1]) or decode(*args, **kwargs))
    for path in (root, archive):
        decoded.clear()
        first, second = (load_data(folder_settings(path), seed=0, cache_dir=tmp_path / "cache") for _ in range(2))
        assert len(decoded) == 36
        assert image_numbers(first.train) == image_numbers(second.train)
        if path == root:
            (root / "train/cat/0000.png").write_bytes(picture(999))
        else:
            write_tar(archive, {**files(), "train/cat/0000.png": picture(999)})
        changed = load_data(folder_settings(path), seed=0, cache_dir=tmp_path / "cache")
        assert len(decoded) == 72
        assert 999 in image_numbers(changed.train) + image_numbers(changed.val) + image_numbers(changed.calibration)


def test_files_of_the_test_set_may_serve_as_validation(tmp_path):
    root = write_folder(tmp_path / "set", files())
    settings = folder_settings(root, validation_source="test", validation_match="*/000[0-1].png")
    splits = load_data(settings, seed=0, cache_dir=tmp_path)
    assert sorted(image_numbers(splits.val)) == [24, 25, 30, 31]
    assert sorted(image_numbers(splits.test)) == [26, 27, 28, 29, 32, 33, 34, 35]
    assert len(splits.train) + len(splits.calibration) == 24


@pytest.mark.parametrize(("match", "which"), [("*/9*", "no"), ("*", "every")])
def test_a_match_that_divides_nothing_is_refused(tmp_path, match, which):
    root = write_folder(tmp_path / "set", files())
    settings = folder_settings(root, validation_source="test", validation_match=match)
    with pytest.raises(DataError, match=f"matches {which} test file"):
        load_data(settings, seed=0, cache_dir=tmp_path)


def test_images_of_several_sizes_need_a_size(tmp_path):
    content = {**files(), "train/cat/0003.png": picture(3, side=9)}
    root = write_folder(tmp_path / "set", content)
    with pytest.raises(DataError, match=r"0003\.png is 9x9 pixels, the first image 6x6: set preprocessing\.size"):
        load_data(folder_settings(root), seed=0, cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    splits = load_data(folder_settings(root, size=4), seed=0, cache_dir=tmp_path / "cache")
    assert splits.sample_shape == (3, 4, 4)
    assert 3 in image_numbers(splits.train) + image_numbers(splits.val) + image_numbers(splits.calibration)


@pytest.mark.parametrize("packed", [False, True])
def test_an_unreadable_image_is_named(tmp_path, packed):
    content = {**files(), "train/dog/0005.png": picture(5)[:40]}
    path = write_tar(tmp_path / "s.tar", content, mode="w") if packed else write_folder(tmp_path / "set", content)
    with pytest.raises(DataError, match=r"image .*train/dog/0005\.png.* cannot be read"):
        load_data(folder_settings(path), seed=0, cache_dir=tmp_path / "cache")


def test_folders_without_images_are_refused(tmp_path):
    root = write_folder(tmp_path / "set", files())
    (root / "train" / "fish").mkdir()
    with pytest.raises(DataError, match="class 'fish' has no image in"):
        load_data(folder_settings(root), seed=0, cache_dir=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images under train/<class>/"):
        load_data(folder_settings(tmp_path / "empty"), seed=0, cache_dir=tmp_path)
    content = {**files(), "test/fish/0.png": picture(1)}
    with pytest.raises(DataError, match="class 'fish' has no training sample"):
        load_data(folder_settings(write_folder(tmp_path / "odd", content)), seed=0, cache_dir=tmp_path)


def test_archives_that_are_none_or_cut_off_or_hold_an_empty_class_are_refused(tmp_path):
    (tmp_path / "text.tar").write_text("no archive")
    with pytest.raises(DataError, match="not a tar archive"):
        load_data(folder_settings(tmp_path / "text.tar"), seed=0, cache_dir=tmp_path)
    for mode in ("w:gz", "w:xz"):
        path = write_tar(tmp_path / f"cut.{mode[2:]}", files(), mode=mode)
        path.write_bytes(path.read_bytes()[:-200])
        with pytest.raises(DataError, match="not a tar archive that can be read"):
            load_data(folder_settings(path), seed=0, cache_dir=tmp_path)
    with tarfile.open(write_tar(tmp_path / "e.tar", files(), mode="w"), "a") as archive:
        member = tarfile.TarInfo("train/fish")
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
    with pytest.raises(DataError, match="class 'fish' has no image"):
        load_data(folder_settings(tmp_path / "e.tar"), seed=0, cache_dir=tmp_path)


def test_a_folder_that_is_too_large_to_hold_is_streamed_with_the_same_splits(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "set", files())
    held = load_data(folder_settings(root), seed=0, cache_dir=tmp_path / "one")
    assert isinstance(held.train, TensorSplit)
    monkeypatch.setattr(folders, "MEMORY_LIMIT", 1000)
    streamed = load_data(folder_settings(root), seed=0, cache_dir=tmp_path / "two")
    assert not (tmp_path / "two").exists()
    for name, split in parts(streamed).items():
        assert isinstance(split, StreamSplit)
        inline = StreamSplit(split.dataset, split.index, split.transform, split.num_classes, workers=0)
        assert image_numbers(inline) == image_numbers(getattr(held, name))
        assert torch.equal(whole(inline)[1], whole(getattr(held, name))[1])
    archive = write_tar(tmp_path / "set.tar", files(), mode="w")
    with pytest.raises(DataError, match="unpack it"):
        load_data(folder_settings(archive), seed=0, cache_dir=tmp_path / "two")


@pytest.mark.slow
def test_the_cifar_archive_is_read_with_its_own_validation_files(tmp_path):
    data = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).parents[5] / "shared" / "data"))
    if not (data / "cifar10-jpeg.tar.xz").exists():
        pytest.skip(f"{data}/cifar10-jpeg.tar.xz is absent; AUTOPRUNE_DATA names its folder")
    settings = folder_settings(
        data / "cifar10-jpeg.tar.xz", validation_source="test", validation_match="*/0[0-4]??.jpg"
    )
    splits = load_data(settings, seed=0, cache_dir=tmp_path)
    assert [len(split) for split in parts(splits).values()] == [49_488, 512, 5_000, 5_000]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("as_dataset", [False, True], ids=["tensors", "Dataset"])
def test_whole_numbers_stay_whole_numbers_on_their_way_to_the_network(dtype, as_dataset):
    ids, y = torch.arange(120 * 7).reshape(120, 7).to(dtype), torch.arange(120) % 2
    train = torch.utils.data.TensorDataset(ids, y) if as_dataset else (ids.numpy(), y.numpy())
    splits = as_splits({"train": train}, settings=DataSettings(calibration=8))
    for split in (splits.train, splits.calibration, splits.val, splits.test):
        for x, _ in split.batches(16, shuffle=torch.Generator(), augment=True):
            assert x.dtype == torch.int64
            assert all(int(row[0]) % 7 == 0 for row in x)
    assert splits.first(2).shape == (2, 7)


def test_whole_numbers_become_real_ones_where_they_are_standardised_or_a_network_wants_these_alone():
    ids, y = torch.arange(120 * 7).reshape(120, 7), torch.arange(120) % 2
    given = {"train": (ids, y)}
    splits = as_splits(given, settings=DataSettings(calibration=8))
    assert splits.given_out(whole=False).first(2).dtype == torch.float32
    assert splits.first(2).dtype == torch.int64
    scaled = DataSettings(calibration=8, mean=(1.0,) * 7, std=(2.0,) * 7)
    assert as_splits(given, settings=scaled).first(2).dtype == torch.float32


def test_truth_values_reach_a_network_as_real_numbers():
    x, y = torch.arange(120 * 3).reshape(120, 3) % 2 == 0, torch.arange(120) % 2
    assert as_splits({"train": (x, y)}, settings=DataSettings(calibration=8)).first(2).dtype == torch.float32


def test_images_are_given_out_contiguous_where_a_network_needs_that():
    splits = as_splits({"train": labelled(90)}, settings=DataSettings(calibration=8)).given_out(channels_last=False)
    assert next(iter(splits.val.batches(4)))[0].is_contiguous()
    x = torch.rand(90, 3, 5, 5)
    colour = as_splits({"train": (x, torch.arange(90) % 2)}, settings=DataSettings(calibration=8))
    assert not next(iter(colour.val.batches(4)))[0].is_contiguous()
    assert next(iter(colour.given_out(channels_last=False).val.batches(4)))[0].is_contiguous()
