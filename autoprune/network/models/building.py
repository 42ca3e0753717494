"""Which networks can be named, and how one is built.

Decides what a name, a factory and weights stand for. Knows nothing of data or of pruning.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import sys
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from autoprune.errors import InputError, nearest
from autoprune.network.models.torchvision import import_torchvision
from autoprune.network.models.zoo import ZOO

# Auxiliary heads exist in training mode alone, where no trace of the evaluated network sees them: built without.
_TORCHVISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": True},
    "inception_v3": {"aux_logits": False, "init_weights": True},
}


_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def model_names() -> list[str]:
    """Returns the names that `build_model` knows: our zoo, then torchvision's classification builders."""
    models = import_torchvision().models
    return [*ZOO, *models.list_models(module=models)]


def build_model(
    *,
    name: str | None = None,
    factory: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    weights: str | None = None,
    num_classes: int | None = None,
    seed: int = 0,
) -> nn.Module:
    """Builds a network on the CPU, in training mode as PyTorch leaves it; its initial weights follow from `seed` alone.

    Args:
        name: A name of `model_names()`; exactly one of `name` and `factory` is given.
        factory: `package.module:function`, a function that returns an `nn.Module`.
        arguments: Keyword arguments for the builder.
        weights: Name of torchvision weights such as `DEFAULT` or `IMAGENET1K_V2`.
        num_classes: Passed to the builder where it takes `num_classes` and `arguments` does not give one.
        seed: Seed of the initial weights; the global generator is left as it was.

    Raises:
        InputError: Both or neither of `name` and `factory` are given; the name is unknown; the factory cannot be
            imported; the builder refuses the arguments or returns something else than an `nn.Module`; the weights
            are unknown, do not fit the number of classes, or can be neither found nor downloaded.
    """
    if (name is None) == (factory is None):
        raise InputError("a model needs either a name or a factory, and not both")
    if weights is not None and (name is None or name in ZOO):
        raise InputError(
            f"weights {weights!r} name weights of torchvision; {name or factory} has none: use a checkpoint"
        )
    keywords = dict(arguments or {})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if factory is not None:
            builder, label = import_factory(factory), factory
        elif name is not None and name in ZOO:
            builder, label = ZOO[name], name
        else:
            assert name is not None  # exactly one of the two is given
            return _build_torchvision(name, arguments=keywords, weights=weights, num_classes=num_classes)
        if num_classes is not None and _accepts(builder, "num_classes"):
            keywords.setdefault("num_classes", num_classes)
        model = _call(builder, label, keywords)
    if not isinstance(model, nn.Module):
        raise InputError(f"{label} returned {type(model).__name__}, not a torch.nn.Module")
    return model


def import_factory(path: str, *, what: str = "factory") -> Callable[..., Any]:
    """Returns the function that `package.module:function` names; modules of the working directory are found too.

    Raises:
        InputError: The text has another form, there is no such module, importing it fails, it has no such attribute, or
            the attribute cannot be called.
    """
    module_name, colon, attribute = path.partition(":")
    if not (module_name and colon and attribute):
        raise InputError(f"{what} {path!r} must have the form package.module:function")
    if os.getcwd() not in sys.path:  # an installed command starts without it; last, so that it shadows nothing
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise InputError(
                f"{what} {path!r}: there is no module {error.name!r} (working directory: {os.getcwd()})"
            ) from error
        raise InputError(f"{what} {path!r}: {module_name} needs the module {error.name!r}, not installed") from error
    except (ImportError, SyntaxError) as error:
        raise InputError(f"{what} {path!r}: importing {module_name} fails: {error}") from error
    if not hasattr(module, attribute):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise InputError(f"{what} {path!r}: {module_name} has no {attribute!r}{nearest(attribute, public)}")
    function = getattr(module, attribute)
    if not callable(function):
        raise InputError(f"{what} {path!r}: {attribute} is a {type(function).__name__} and cannot be called")
    return cast(Callable[..., Any], function)


def _build_torchvision(
    name: str, *, arguments: dict[str, Any], weights: str | None, num_classes: int | None
) -> nn.Module:
    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"unknown model {name!r}{nearest(name, [*ZOO, *known])}")
    if num_classes is not None:
        arguments.setdefault("num_classes", num_classes)
    for key, value in _TORCHVISION_DEFAULTS.get(name, {}).items():
        arguments.setdefault(key, value)
    builder = models.get_model_builder(name)
    if weights is None:
        return cast(nn.Module, _call(builder, name, {**arguments, "weights": None}))
    entries = models.get_model_weights(name)
    if weights not in entries.__members__:
        raise InputError(f"unknown weights {weights!r} for {name}{nearest(weights, entries.__members__)}")
    entry = entries[weights]
    classes = len(entry.meta["categories"])
    if arguments.get("num_classes", classes) != classes:
        raise InputError(
            f"weights {weights} of {name} have {classes} classes but {arguments['num_classes']} were asked for: "
            "leave the weights out, or give a factory that replaces the last layer"
        )
    try:
        with _only_weights():
            return cast(nn.Module, _call(builder, name, {**arguments, "weights": entry, "progress": False}))
    except (urllib.error.URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints")
        file = entry.url.rsplit("/", 1)[-1]
        raise InputError(
            f"weights {weights} of {name} could not be loaded ({error}): put the file {file} "
            f"(from {entry.url}) into {folder}"
        ) from error


@contextmanager
def _only_weights() -> Iterator[None]:
    """Makes every `torch.load` inside refuse what is no tensor; torchvision's own call asks for the whole pickle."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _accepts(builder: Callable[..., Any], keyword: str) -> bool:
    parameters = inspect.signature(builder).parameters
    return keyword in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _call(builder: Callable[..., Any], label: str, keywords: Mapping[str, Any]) -> Any:
    """Calls the builder; arguments that its signature refuses are the user's fault, errors inside it are not hidden."""
    try:
        inspect.signature(builder).bind(**keywords)
    except TypeError as error:
        raise InputError(f"model {label} does not take these arguments: {error}{_hint(builder, keywords)}") from error
    try:
        return builder(**keywords)
    except TypeError as error:
        if "unexpected keyword argument" in str(error) or ":" not in label:  # a builder that passes **kwargs on
            raise InputError(f"model {label} does not take these arguments: {error}") from error
        raise
    except InputError:
        raise
    except (ValueError, RuntimeError) as error:
        if ":" in label or keywords.get("weights") is not None:  # a factory, whose errors are its author's
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"model {label} cannot be built with {dict(keywords)}: {reason}") from error


def _hint(builder: Callable[..., Any], keywords: Mapping[str, Any]) -> str:
    parameters = list(inspect.signature(builder).parameters)
    wrong = [key for key in keywords if key not in parameters]
    return nearest(wrong[0], parameters) if wrong else ""
