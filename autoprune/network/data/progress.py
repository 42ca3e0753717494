"""Splits that tell of every batch, so that whoever waits for an evaluation sees that it makes progress.

Decides where progress is seen: every loop of an evaluation, training or not, asks a split for its batches. Must not
know who listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Generator

from autoprune.network.data.loading import Splits
from autoprune.network.data.samples import Split
from autoprune.network.data.staging import Batch, Device


@dataclass(frozen=True, eq=False)
class WatchedSplit:
    """The same samples as `split`; `beat` is called when a batch is asked for, and ends the loop by what it raises."""

    split: Split
    beat: Callable[[], None]

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole data set; 0 where the targets are no classes."""
        return self.split.num_classes

    def __len__(self) -> int:
        return len(self.split)

    def batches(
        self,
        batch_size: int,
        *,
        shuffle: Generator | None = None,
        augment: bool = False,
        device: Device = "cpu",
        limit: int | None = None,
    ) -> Iterator[Batch]:
        """Yields batches as `Split.batches` says."""
        inner = self.split.batches(batch_size, shuffle=shuffle, augment=augment, device=device, limit=limit)
        return self._told(inner)

    def _told(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.beat()
            yield batch


def watched(splits: Splits, beat: Callable[[], None]) -> Splits:
    """Returns `splits` with every batch told to `beat`."""
    return splits.changed(lambda split: WatchedSplit(split, beat))
