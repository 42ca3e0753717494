"""Where layers meet their inputs: modules that are called, and parameters that a forward pass multiplies by itself.

The packed projections of `nn.MultiheadAttention` are rows of one parameter without a module; other attention code calls
`linear` with the weight of a module that it never calls, to put a bias together on the way. Decides how both are
listened to. Knows nothing of statistics or of refits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from autoprune.network.graph.groups import Links
from autoprune.network.graph.network import Network
from autoprune.network.surgery.narrowing import shifted, starts
from autoprune.network.surgery.sizes import uncounted

Heard = Callable[[str, Tensor], None]
"""Is told the name of a site and what it is about to read."""


@dataclass(frozen=True, slots=True)
class Rows:
    """`count` rows of the parameter `weight` from `start` on, and as many entries of `bias` from `bias_start` on."""

    weight: str
    start: int
    count: int
    bias: str | None
    bias_start: int

    def of(self, model: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Returns the rows of the weight and of the bias in `model`, as views."""
        weight = model.get_parameter(self.weight).detach()[self.start : self.start + self.count]
        if self.bias is None:
            return weight, None
        return weight, model.get_parameter(self.bias).detach()[self.bias_start : self.bias_start + self.count]


def rows_of_site(network: Network, links: Links, kept: np.ndarray | None = None) -> Rows:
    """Returns the rows that a use of a weight reads, in the dense model, or in one that has the units `kept` alone."""
    layer, count = links.layer, len(links.outputs)
    if kept is None:
        return Rows(layer.weight, layer.start, count, layer.bias, layer.bias_start)
    start, bias_start = starts(network, layer, kept)
    stop = shifted(network, layer.weight, layer.start + count, kept)
    return Rows(layer.weight, start, stop - start, layer.bias, bias_start)


def multiplied(network: Network) -> dict[str, Links]:
    """Returns the linear layers, by site, that no call of a module makes and each of whose rows is used once."""
    uses: dict[str, list[Links]] = {}
    for links in network.links:
        uses.setdefault(links.layer.weight, []).append(links)
    found: dict[str, Links] = {}
    for all_uses in uses.values():
        covered = sum(len(links.outputs) for links in all_uses)
        starts = {links.layer.start for links in all_uses}
        whole = len(network.model.get_parameter(all_uses[0].layer.weight)) if _plain(all_uses) else -1
        if covered == whole and len(starts) == len(all_uses):
            found |= {links.site: links for links in all_uses if not links.called}
    return found


def _plain(uses: list[Links]) -> bool:
    return all(links.layer.kind == "linear" and links.layer.out_dim == 0 for links in uses)


@contextmanager
def listening(model: nn.Module, sites: Mapping[str, Rows | None], heard: Heard) -> Iterator[None]:
    """Tells `heard` whatever the sites read, just before they do.

    Args:
        model: The model that will run.
        sites: Path of a module, or the name of a site that stands for `Rows` of a parameter.
        heard: Is called with the name of the site and its input.
    """
    modules = dict(model.named_modules())

    def hook(site: str) -> Callable[..., None]:
        def called(module: nn.Module, args: Any) -> None:
            with uncounted():
                heard(site, args[0])

        return called

    with ExitStack() as stack:
        parts: dict[tuple[int, int], str] = {}
        for site, rows in sites.items():
            if rows is None:
                stack.callback(modules[site].register_forward_pre_hook(hook(site)).remove)
            elif rows.count:
                parts[rows.of(model)[0].data_ptr(), rows.count] = site
        if parts:
            stack.enter_context(_Linears(parts, heard))
        yield


class _Linears(TorchFunctionMode):
    """Listens to `linear` with weights that begin at an address and have a number of rows."""

    def __init__(self, parts: Mapping[tuple[int, int], str], heard: Heard) -> None:
        super().__init__()
        self._parts, self._heard = parts, heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and len(args) > 1:
            site = self._parts.get((args[1].data_ptr(), len(args[1])))
            if site is not None:
                with uncounted():
                    self._heard(site, args[0])
        return func(*args, **(kwargs or {}))


def rows_of(links: Links, weight: Tensor) -> Tensor:
    """Returns the rows of the weight that a layer uses as `(outputs, fan-in)` double."""
    rows = weight.movedim(links.layer.out_dim, 0).reshape(weight.shape[links.layer.out_dim], -1).double()
    return rows[links.layer.start : links.layer.start + len(links.outputs)]
