"""The traced network: a plain value that holds the dense model, its record and what was assembled from it.

Decides what is known of a network without running it. Knows nothing of how a model is traced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor, nn

from autoprune.cost import CostModel, Surface
from autoprune.errors import TraceError, nearest
from autoprune.network.graph.assembly import assemble
from autoprune.network.graph.attributes import Attribute, following
from autoprune.network.graph.groups import Assembly, Frozen, IndexMap, Links, PruningGroup, units_of
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.record import Record, Width
from autoprune.policy import CHANNEL


@dataclass(frozen=True, slots=True)
class Told:
    """A size that a module is told: the `axis` of a call in its forward pass, counted from 0, has `labels`."""

    module: str
    call: int
    axis: int
    labels: Labels


@dataclass(frozen=True)
class Network:
    """A model that was traced: its pruning groups, what is frozen and why, and its exact cost model.

    `model` is the dense model itself, or a copy with the same tensors in which attention modules that cannot lose heads
    are replaced by equivalent ones; it is never changed. `example_inputs` keep the shapes that it was traced with;
    the first dimension of the first one is the batch, and costs are for one sample.
    """

    model: nn.Module
    example_inputs: tuple[Tensor, ...]
    record: Record
    assembly: Assembly
    broken: dict[str, str]
    notes: tuple[str, ...] = ()
    removable: frozenset[str] = frozenset()
    """Groups that may lose all of their channels, as `removable.with_removable` found them."""
    told: tuple[Told, ...] = ()
    """Sizes that modules cannot know by themselves, as `computed_sizes.with_told_sizes` found them."""
    checked: tuple[Width, ...] = ()
    """Attributes that modules compare with a width, as `checked_widths` found them."""
    followers: tuple[Attribute, ...] | None = None
    """What `attributes` returns of a network that was cut before: its numbers do not name dimensions any more."""
    channels_last: bool = True
    """Whether images may lie channels-last in memory; `runs_channels_last` tells."""
    pruning: str = CHANNEL
    """What a group is: `channel`, or a weight whose elements are masked (`unstructured`, `2:4`)."""

    @property
    def masked(self) -> bool:
        """Whether single weights are masked, instead of channels removed."""
        return self.pruning != CHANNEL

    @property
    def groups(self) -> tuple[PruningGroup, ...]:
        """The groups that may be pruned, in the order of the graph."""
        return self.assembly.groups

    @property
    def frozen(self) -> tuple[Frozen, ...]:
        """Layers whose output channels all stay, with the reason."""
        return self.assembly.frozen

    @property
    def cost_model(self) -> CostModel:
        """Prices any widths: MACs, parameters, bytes, activation memory."""
        return self.assembly.cost_model

    @property
    def index_map(self) -> IndexMap:
        """Which index of which dimension of which parameter belongs to which channel."""
        return self.assembly.index_map

    @property
    def links(self) -> tuple[Links, ...]:
        """Every use of a weight, in the order of the graph."""
        return self.assembly.links

    @property
    def attributes(self) -> tuple[Attribute, ...]:
        """Integer attributes of modules that must follow when channels go."""
        if self.followers is not None:
            return self.followers
        sizes = [(size, self.units_of(size.labels)) for size in self.record.literals]
        checked = (Attribute(width.module, width.name, self.units_of(width.labels)) for width in self.checked)
        return (*following(self.model, sizes), *(own for own in checked if (own.units >= 0).any()))

    def group(self, name: str) -> PruningGroup:
        """Returns the group called `name`.

        Raises:
            TraceError: There is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise TraceError(f"no pruning group {name!r}{nearest(name, [g.name for g in self.groups])}")

    def units_of(self, labels: Labels) -> Labels:
        """Returns the units of labels of the record, as in the index map."""
        return units_of(self.record.solution, self.assembly.unit, labels)

    def with_latency(self, surfaces: tuple[Surface, ...]) -> Network:
        """Returns the network with a cost model that also predicts latency, from the surfaces of a latency table."""
        model = replace(self.cost_model, latency=surfaces)
        return replace(self, assembly=replace(self.assembly, cost_model=model))

    def freeze(self, reasons: dict[str, str]) -> Network:
        """Returns the network with the groups in `reasons` frozen."""
        broken = self.broken | reasons
        return replace(
            self, broken=broken, assembly=assemble(self.record, broken), removable=self.removable - reasons.keys()
        )
