"""autoprune: pruning-policy search for trained PyTorch models.

    net = autoprune.trace(model, example_inputs)
    small = autoprune.prune(net, ratios=0.5, criterion="l2", calibration=batches)
    result = autoprune.search(model, data=data, budget={"macs": 0.5}, trials=50)

Decides the public names and loads each one on first use, so that `import autoprune` is light. Knows nothing of what
they do.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.coordinator import search as search
    from autoprune.errors import AutopruneError as AutopruneError
    from autoprune.errors import BudgetError as BudgetError
    from autoprune.errors import CheckpointError as CheckpointError
    from autoprune.errors import DataError as DataError
    from autoprune.errors import InputError as InputError
    from autoprune.errors import LeaseError as LeaseError
    from autoprune.errors import MissingExtraError as MissingExtraError
    from autoprune.errors import PolicyError as PolicyError
    from autoprune.errors import SpaceError as SpaceError
    from autoprune.errors import StorageError as StorageError
    from autoprune.errors import StudyError as StudyError
    from autoprune.errors import TraceError as TraceError
    from autoprune.errors import TrackingError as TrackingError
    from autoprune.errors import TrialError as TrialError
    from autoprune.network import load as load
    from autoprune.network import prune as prune
    from autoprune.network import trace as trace

    __version__: str

__all__ = [
    "AutopruneError",
    "BudgetError",
    "CheckpointError",
    "DataError",
    "InputError",
    "LeaseError",
    "MissingExtraError",
    "PolicyError",
    "SpaceError",
    "StorageError",
    "StudyError",
    "TraceError",
    "TrackingError",
    "TrialError",
    "__version__",
    "load",
    "prune",
    "search",
    "trace",
]

_FUNCTIONS = {
    "load": "autoprune.network",
    "prune": "autoprune.network",
    "search": "autoprune.coordinator",
    "trace": "autoprune.network",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("autoprune")
    elif name in _FUNCTIONS:
        value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
    elif name in __all__:
        value = getattr(importlib.import_module("autoprune.errors"), name)
    else:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
