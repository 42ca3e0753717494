"""How a pruned network is repaired before it is trained or scored: refits, and the statistics of its batch norms.

Decides which repair a recipe asks for (masks, merging, the sequential or the cached refit), and which images it is made
on where a rung asks for another number than are set aside for calibration. ResNet-56 / CIFAR-10, 5,000 validation
images, no fine-tuning, channels by obs_greedy: 512, 2,048, 4,096 and 8,192 images, with as many more patches a layer,
give 82.7, 83.3, 83.6 and 83.5 % at 0.35 of the MACs and 87.0, 87.1, 87.3 and 87.2 % at 0.5, in 2.6, 10.5, 24 and 38 s.
Knows nothing of policies.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from autoprune.network.calibration.one_pass import gather_both
from autoprune.network.calibration.targets import DEEP_ROWS, ROWS, Targets, gather_targets
from autoprune.network.criteria.knowledge import Knowledge
from autoprune.network.data.loading import Splits
from autoprune.network.devices.precision import Precision, autocast
from autoprune.network.graph.network import Network
from autoprune.network.repair.batch_norms import recalibrate
from autoprune.network.repair.compensation import compensate
from autoprune.network.repair.masked import repair_masked
from autoprune.network.repair.merging import merge
from autoprune.network.repair.sequential import refit_sequentially
from autoprune.network.surgery.selection import Selection
from autoprune.network.training.recipe import Recipe

_BATCH = 64


@dataclass(frozen=True)
class Repairs:
    """Repairs networks that were cut from one dense `network`, by one recipe.

    `deeper` keeps targets on other numbers of images than `knowledge` has, by number.
    """

    network: Network
    splits: Splits
    recipe: Recipe
    knowledge: Knowledge
    device: str = "cpu"
    precision: Precision = field(default_factory=Precision)
    seed: int = 0
    deeper: dict[int, Targets] = field(default_factory=dict)

    def repaired(
        self,
        model: nn.Module,
        selection: Selection,
        cut_from: Network | None = None,
        *,
        calibration: int | None = None,
    ) -> nn.Module:
        """Repairs `model` in place and returns it.

        Args:
            model: What surgery or masking left of the network.
            selection: What stayed.
            cut_from: What a schedule has made of the dense network, where `model` was cut from that.
            calibration: How many images the refit is made on, of the dense network alone; None: those set aside for it.
        """
        recipe, network = self.recipe, cut_from or self.network
        knowledge = self.knowledge if network is self.network else self._learnt(network)
        targets = self._targets(calibration) if network is self.network else None
        if targets is not None:
            knowledge = replace(knowledge, targets=targets)
        passes = autocast(self.device, self.precision.autocast_dtype)  # images go through in the type that scores have
        if network.masked and recipe.compensation and selection:
            targets = knowledge.targets if recipe.recalibration_batches > 0 else None
            with passes:
                repair_masked(network, model, selection, knowledge.statistics, targets, ridge=recipe.ridge)
            if targets is not None:
                return model
        elif recipe.compensation == "merge" and selection:
            merge(network, model, selection)
        elif recipe.compensation and selection and knowledge.statistics:
            recalibrated = recipe.recalibration_batches > 0
            ridge, statistics = recipe.ridge, knowledge.statistics
            if knowledge.targets is not None and recalibrated:
                wanted = replace(knowledge.targets, statistics=statistics)
                with passes:
                    refit_sequentially(network, model, selection, wanted, ridge=ridge)
                return model  # that pass took the batch norms' statistics too
            compensate(network, model, selection, statistics, ridge=ridge, recalibrated=recalibrated)
        # The very same statistics for every candidate: the same images in the same order.
        batches, images = recipe.recalibration_batches, self.splits.calibration
        with passes:
            recalibrate(model, images, batches=batches, device=self.device, seed=self.seed)
        return model

    def _targets(self, calibration: int | None) -> Targets | None:
        """Returns the dense network's targets on so many images, None where no more were asked for than are known."""
        known, count = self.knowledge.targets, len(self.splits.calibration)
        if calibration is None or known is None or calibration == count:
            return None
        if calibration not in self.deeper:
            images = repair_images(self.splits, calibration, seed=self.seed, device=self.device)
            rows = round(known.rows * DEEP_ROWS / ROWS * calibration / count)
            self.deeper[calibration] = gather_targets(self.network, images, rows=rows, seed=self.seed)
        return self.deeper[calibration]

    def _learnt(self, network: Network) -> Knowledge:
        """Gathers what compensation needs to know about a network that a schedule has trained."""
        if self.recipe.compensation is not True:
            return Knowledge()
        images = self.splits.calibration

        def batches(limit: int | None) -> Iterator[Tensor]:
            return (x for x, _ in images.batches(_BATCH, limit=limit, device=self.device))

        number = -(-len(images) // _BATCH)
        found = gather_both(network, batches, len(images), number=number, seed=self.seed, device=self.device)
        return Knowledge(*found)


def repair_images(splits: Splits, count: int, *, seed: int, device: str) -> Tensor:
    """Returns `count` samples `(count, ...)`: those for calibration first, then training samples drawn by `seed`.

    Fewer where the data has no more.
    """
    few = min(count, len(splits.calibration))
    found = [x for x, _ in splits.calibration.batches(_BATCH, limit=few, device=device)]
    missing = min(count - few, len(splits.train))
    order = torch.Generator().manual_seed(seed)
    for x, _ in splits.train.batches(_BATCH, shuffle=order, device=device):
        if missing <= 0:
            break
        found.append(x[:missing])
        missing -= len(x)
    return torch.cat(found)
