"""The one door to torchvision.

Decides how torchvision is imported where its compiled extension cannot load (the wheel of the package index is linked
against CUDA; beside a CPU build of torch its import fails with `operator torchvision::nms does not exist`). Must not
know what the caller wants from torchvision. Nothing else in autoprune writes `import torchvision`.
"""

from __future__ import annotations

import importlib
import sys
import threading
import warnings
from types import ModuleType

import torch

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: list[torch.library.Library] = []  # a library that is collected takes its declarations with it
_lock = threading.Lock()


def import_torchvision() -> ModuleType:
    """Returns torchvision, imported so that models, transforms and datasets work without its compiled extension too.

    Where the extension cannot load, the two operators that the import asks for are declared without an implementation:
    detection operators then raise torchvision's own error when they are called. Where it loads, nothing is declared.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: torchvision and torch do not fit together for another reason than the missing extension.
    """
    with _lock, warnings.catch_warnings():
        # Said once by torchvision.io when the extension is absent; images are read with Pillow here.
        warnings.filterwarnings("ignore", message="Failed to load image Python extension")
        try:
            return importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error) or _declared:
                raise
        for name in [name for name in sys.modules if name == "torchvision" or name.startswith("torchvision.")]:
            del sys.modules[name]  # what the failed import left half-made
        library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
        for operator in ("nms", "qnms"):
            library.define(operator + _SCHEMA)  # type: ignore[no-untyped-call]
        _declared.append(library)
        return importlib.import_module("torchvision")
