"""Activation functions that may be replaced by others, cheaper on small devices.

Decides which modules are activations of which kind, to which scope each belongs, and how they are replaced in a pruned
copy. A function that the forward pass calls (`F.relu`) is no module and stays. Knows nothing of how a choice is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from autoprune.errors import InputError, nearest
from autoprune.network.graph.assembly import stages_of
from autoprune.network.graph.groups import module_of
from autoprune.network.graph.modules import evaluating
from autoprune.network.graph.network import Network
from autoprune.network.graph.rules.table import operator_name

ACTIVATIONS: Mapping[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
    "hardtanh": nn.Hardtanh,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
}
"""Kinds → how one is made, with PyTorch's defaults."""

_KIND_OF = {make: kind for kind, make in ACTIVATIONS.items()}


@dataclass(frozen=True, slots=True)
class Site:
    """An activation module: its path, its kind, and the stage of the layer that runs before it."""

    path: str
    kind: str
    stage: str


def activation_sites(network: Network) -> tuple[Site, ...]:
    """Returns the activation modules that the forward pass calls, in the order of their first call."""
    stages = stages_of(network.record.layers)
    stage_of = {module_of(weight): stage for weight, stage in stages.items()}
    found: dict[str, Site] = {}
    now = next(iter(stages.values()), "model")

    def hook(path: str) -> Callable[..., None]:
        def record(module: nn.Module, args: Any) -> None:
            nonlocal now
            now = stage_of.get(path, now)
            kind = _KIND_OF.get(type(module))
            if kind is not None:
                found.setdefault(path, Site(path, kind, now))

        return record

    handles = [module.register_forward_pre_hook(hook(path)) for path, module in network.model.named_modules()]
    try:
        with evaluating(network.model), torch.no_grad():
            network.model(*network.example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(found.values())


def choices_of(network: Network, wanted: Mapping[str, Sequence[str]], scope: str) -> dict[str, tuple[str, ...]]:
    """Returns `<scope>/<kind>` → what may stand there, for every place of the network where something of that kind is.

    Args:
        network: The traced network.
        wanted: Kind → the kinds that may stand in its place, the first of which is taken where nothing is searched.
        scope: `model`, `stage` or `layer`: what chooses together.

    Raises:
        InputError: A kind is unknown, or the network has no module of that kind.
    """
    if not wanted:
        return {}
    sites = activation_sites(network)
    found: dict[str, tuple[str, ...]] = {}
    for kind, names in wanted.items():
        for name in (kind, *names):
            if name not in ACTIVATIONS:
                raise InputError(f"unknown activation {name!r}{nearest(name, ACTIVATIONS)}")
        own = [site for site in sites if site.kind == kind]
        if not own:
            raise InputError(f"activations.{kind}: {_missing(network, kind, sites)}")
        found.update({f"{scope_of(site, scope)}/{kind}": tuple(names) for site in own})
    return found


def scope_of(site: Site, scope: str) -> str:
    """Returns the name of the scope that an activation belongs to."""
    return {"model": "model", "stage": site.stage, "layer": site.path}[scope]


def _missing(network: Network, kind: str, sites: Iterable[Site]) -> str:
    with evaluating(network.model), torch.no_grad(), _Names() as called:
        network.model(*network.example_inputs)
    if kind in called.names or (kind == "relu6" and "hardtanh" in called.names):
        return f"the model calls {kind} as a function: nothing to replace; make it an {_name(kind)} module"
    others = ", ".join(sorted({site.kind for site in sites})) or "none that can be replaced"
    return f"the model has no {_name(kind)}; its activation modules are: {others}"


def _name(kind: str) -> str:
    return f"nn.{getattr(ACTIVATIONS[kind], '__name__', kind)}"


class _Names(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(operator_name(func))
        return func(*args, **(kwargs or {}))


def replacements(sites: Iterable[Site], scope: str, chosen: Mapping[str, str]) -> dict[str, str]:
    """Returns path → new kind for every activation that `chosen` (`<scope>/<kind>` → kind) really changes."""
    wanted = {site: chosen.get(f"{scope_of(site, scope)}/{site.kind}", site.kind) for site in sites}
    return {site.path: kind for site, kind in wanted.items() if kind != site.kind}


def replace_activations(model: nn.Module, plan: Mapping[str, str]) -> None:
    """Puts new activations into `model`, in place; a module that is used under several paths is replaced in all.

    Raises:
        InputError: A kind is unknown.
    """
    new: dict[int, nn.Module] = {}
    for path, kind in plan.items():
        if kind not in ACTIVATIONS:
            raise InputError(f"unknown activation {kind!r}{nearest(kind, ACTIVATIONS)}")
        old = model.get_submodule(path)
        module = ACTIVATIONS[kind]()
        if getattr(old, "inplace", False) and hasattr(module, "inplace"):
            setattr(module, "inplace", True)  # noqa: B010  a plain assignment is no bool to mypy
        new[id(old)] = module.train(old.training)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in new and path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[id(module)])
