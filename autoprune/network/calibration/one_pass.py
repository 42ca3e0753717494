"""Targets gathered beside the moments, in one pass through the dense network.

Decides when that can be done: the layers' outputs at the drawn positions are kept as batches go through, which must be
what `gather_targets` finds in a pass of its own with all images at once. It is tried on three images, which also tells
where the sequence stands before the batch; where a network does not keep to it (a layer reads a table instead of
images, or pads its input by itself) there is that other pass. Knows nothing of refits.

Beside the moments of ResNet-20 and 512 images, targets take a tenth of the 1.5 s of a pass of their own (one thread).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from autoprune.network.calibration.layer_inputs import listening, rows_of_site
from autoprune.network.calibration.moments import Statistics, gather
from autoprune.network.calibration.patches import drawn
from autoprune.network.calibration.targets import Targets, gather_targets, refittable_layers, target_images, target_rows
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.surgery.sizes import uncounted

_SAME = 1e-3
"""Largest difference of the two ways, relative to a layer's largest output: rounding, no more."""
_TRIED = 3
"""Images on which both ways are compared."""


def gather_both(
    network: Network,
    batches: Callable[[int | None], Iterator[Tensor]],
    count: int,
    *,
    number: int,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[Statistics, Targets]:
    """Returns the moments of every refittable layer's input, and the targets of its output.

    Args:
        network: The traced network, on `device`.
        batches: Yields batches of inputs `(B, ...)`: of the first so many, or of all `count`.
        count: Inputs in all.
        number: Batches in all.
        seed: Draws patches and positions.
        device: Where it runs.

    Raises:
        DataError: There is no batch, or an activation is not finite.
    """
    few = min(count, target_images(network, count))
    second = _batch_second(network, torch.cat(list(batches(_TRIED))).to(device)) if count >= _TRIED else None
    if second is not None:
        with watching(network, few, rows=target_rows(network), seed=seed, second=second) as watch:
            statistics = gather(network, batches(None), seed=seed, device=device, number=number)
        return statistics, watch.targets()
    statistics = gather(network, batches(None), seed=seed, device=device, number=number)
    return statistics, gather_targets(network, torch.cat(list(batches(few))).to(device), seed=seed)


class Watch:
    """Keeps the first `count` images that run through a network, and what its layers give for them at `rows` positions.

    The positions are those that `gather_targets` draws when all these images come at once.
    """

    def __init__(self, count: int, *, rows: int, seed: int) -> None:
        self._count, self._rows, self._seed = count, rows, seed
        self._seen = self._now = 0  # images of the batches before, and of this one
        self._images: list[Tensor] = []
        self._places: dict[str, Tensor] = {}
        self._found: dict[str, Tensor] = {}

    def begin(self, x: Tensor) -> None:
        """A batch `(B, ...)` begins."""
        self._now = len(x)
        if self._seen < self._count:
            self._images.append(x.detach()[: self._count - self._seen])

    def end(self) -> None:
        """The batch has gone through."""
        self._seen += self._now

    def keep(
        self, site: str, rows: Tensor, outputs: Callable[[Tensor], Tensor], *, groups: int = 1, outer: int = 1
    ) -> None:
        """Keeps what a layer gives for the batch: `outputs` `(m, N)` of those of `rows` `(n, ...)` that were drawn.

        Rows stand in the order (`outer`, images, what is left of them).
        """
        if self._seen >= self._count:
            return
        inner = len(rows) // (outer * self._now)
        if site not in self._places:
            total = outer * self._count * inner
            self._places[site] = drawn(total, self._rows, self._seed)
        block = self._places[site] // max(1, self._count * inner)
        places = self._places[site] - (block * self._count + self._seen) * inner  # within the images of this batch
        here = ((places >= 0) & (places < self._now * inner)).nonzero().squeeze(1)
        places += block * self._now * inner
        given = outputs(rows.index_select(0, places[here].to(rows.device)).float())
        given = given.view(len(given), groups, -1 if len(given) else given.shape[1] // groups).transpose(0, 1)
        if site not in self._found:
            shape = (groups, len(self._places[site]), given.shape[2])
            self._found[site] = torch.full(shape, torch.nan, device=rows.device)
        self._found[site].index_copy_(1, here.to(rows.device), given)

    def targets(self) -> Targets:
        """Returns what was kept, once: it is given away."""
        outputs = {site: self._found.pop(site).transpose(1, 2).contiguous() for site in list(self._found)}
        return Targets(torch.cat(self._images), outputs, self._rows, self._seed)


@contextmanager
def watching(
    network: Network, count: int, *, rows: int, seed: int = 0, second: Collection[str] = ()
) -> Iterator[Watch]:
    """Watches the passes through the dense network that are made inside of the context. See `Watch`.

    A module tells its output; of a site that is no module the input is heard, and multiplied once more. At the sites
    in `second` the batch is the second dimension.
    """
    watch, model = Watch(count, rows=rows, seed=seed), network.model
    modules = dict(model.named_modules())
    layers = refittable_layers(network)
    parts = {site: rows_of_site(network, links) for site, links in layers.items()}

    def flat(site: str, x: Tensor) -> tuple[Tensor, int]:
        return x.reshape(-1, x.shape[-1]), x.shape[0] if site in second and x.dim() > 2 else 1

    def called(site: str) -> Callable[..., None]:
        def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            convolution, bias = isinstance(module, nn.modules.conv._ConvNd), parts[site].of(model)[1]
            groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
            with uncounted():
                given, outer = flat(site, output.detach().movedim(1, -1) if convolution else output.detach())
                watch.keep(site, given, lambda y: y if bias is None else y - bias.float(), groups=groups, outer=outer)

        return record

    def heard(site: str, x: Tensor) -> None:
        weight, _ = parts[site].of(model)
        given, outer = flat(site, x.detach())
        watch.keep(site, given, lambda y: y @ weight.float().T, outer=outer)

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(lambda module, args: watch.begin(args[0])).remove)
        for site in [site for site, links in layers.items() if links.called]:
            stack.callback(modules[site].register_forward_hook(called(site)).remove)
        stack.enter_context(listening(model, {s: parts[s] for s in layers if not layers[s].called}, heard))
        stack.callback(model.register_forward_hook(lambda module, args, output: watch.end()).remove)
        yield watch


def _batch_second(network: Network, x: Tensor) -> frozenset[str] | None:
    """Returns the sites at which the batch is the second dimension, or None where outputs kept batch by batch are not
    what a pass with all images `x` `(_TRIED, ...)` finds.
    """
    rows = 512
    expected = gather_targets(network, x, rows=rows).outputs
    second: frozenset[str] = frozenset()
    for _ in range(2):
        with watching(network, len(x), rows=rows, second=second) as watch, evaluating(network.model), torch.no_grad():
            network.model(x[:2])
            network.model(x[2:])
        found = watch.targets().outputs
        if found.keys() != expected.keys():
            return None
        wrong = frozenset(site for site in expected if not _equal(found[site], expected[site]))
        if not wrong:
            return second
        if second:
            return None
        second = wrong
    return None


def _equal(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    return not found.numel() or bool((found - expected).abs().max() <= _SAME * expected.abs().max())
