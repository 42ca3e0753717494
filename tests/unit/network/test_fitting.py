"""What a dense model is asked before anything slow is done: whether it takes the data, and gives what is scored."""

import pytest
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.data.loading import DataSettings, as_splits
from autoprune.network.preparing import Ingredients, example_of, fitting, trace_ingredients


def ingredients(model, x, y, **own):
    splits = as_splits({"train": (x, y)}, settings=DataSettings(calibration=8))
    return Ingredients(model.eval(), splits, {}, "key", **own)


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 2)

    def forward(self, ids):
        return self.head(self.mid(self.emb(ids).mean(1)).relu())


IDS, TWO = torch.randint(10, 50, (200, 12)), torch.arange(200) % 2


def test_a_model_of_tokens_gets_tokens_and_is_traced_on_real_ones():
    given = fitting(ingredients(Tokens(), IDS, TWO))
    example = example_of(given.splits)
    assert example.dtype == torch.int64
    assert int(example.min()) >= 10
    assert {g.name for g in trace_ingredients(given).groups} >= {"mid"}


def test_whole_numbers_become_real_ones_for_a_model_that_takes_these_alone():
    given = fitting(ingredients(nn.Linear(12, 2), IDS, TWO))
    assert example_of(given.splits).dtype == torch.float32


def test_a_single_sample_is_taken_twice():
    x = torch.randn(4, 3)
    splits = as_splits(
        {name: (x[:1], torch.tensor([1.5])) for name in ("train", "calibration", "val", "test")},
        settings=DataSettings(),
    )
    assert example_of(splits).shape == (2, 3)


class Flat(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, classes)

    def forward(self, x):
        return self.head(self.conv(x).relu().view(x.size(0), -1))


IMAGES = torch.randn(200, 3, 8, 8)


def test_images_come_contiguous_to_a_model_that_calls_view():
    given = fitting(ingredients(Flat(2), IMAGES, TWO))
    assert not given.channels_last
    assert next(iter(given.splits.val.batches(4)))[0].is_contiguous()


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Flat(1), "1 numbers a sample, but the data has 2 classes: let it give two logits"),
        (Flat(7), "7 numbers a sample, but the data has 2 classes"),
        (nn.Conv2d(3, 2, 3), r"the shape \(2, 2, 6, 6\), but the data has 2 classes"),
        (
            nn.Conv2d(5, 2, 3),
            r"Conv2d does not run on two samples of the data, float32 of shape \(2, 3, 8, 8\)",
        ),
    ],
    ids=["one logit", "seven", "a map", "five channels"],
)
def test_a_model_that_does_not_fit_its_data_is_refused_before_anything_slow(model, words):
    with pytest.raises(InputError, match=words):
        fitting(ingredients(model, IMAGES, TWO))


def test_with_a_loss_and_a_metric_of_its_own_a_model_may_give_anything():
    def own(output, target):
        return output.mean()

    fitting(ingredients(Flat(1), IMAGES, TWO, loss=own, metric=own))
