"""A saved pruned model behind the interface that MLflow loads: arrays in, arrays out.

Decides how arrays become tensors and on which device they run (the CPU). MLflow finds this module by its name in
`MLmodel` and calls `_load_pyfunc`; nothing is unpickled. Must not import mlflow.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from autoprune.errors import InputError
from autoprune.network.artifacts.saved import load, read_document
from autoprune.network.data.tasks import first_tensor


class ServedModel:
    """A pruned network that takes and gives arrays."""

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.model = model
        self.input_shape = input_shape

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> np.ndarray[Any, Any]:
        """Returns the network's output, such as logits `(N, classes)`, for samples `(N, *input_shape)`.

        Args:
            model_input: An array of float32, or what becomes one.
            params: Not used; MLflow passes it.

        Raises:
            InputError: The array has another shape than samples of this model.
        """
        array = np.asarray(model_input, dtype=np.float32)
        if array.shape[1:] != self.input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise InputError(f"expected samples of shape (N, {wanted}), got an array of shape {array.shape}")
        with torch.inference_mode():
            output = first_tensor(self.model(torch.from_numpy(np.ascontiguousarray(array))))
        return np.asarray(output.float().numpy())


def _load_pyfunc(data_path: str) -> ServedModel:
    """Loads the folder of a saved model; called by `mlflow.pyfunc.load_model`.

    A model of a factory is built by code of the working directory, or of anywhere where the environment has
    `AUTOPRUNE_ALLOW_CODE=1`.

    Raises:
        CheckpointError: The folder does not say how its dense model is built, or is damaged.
        InputError: It is built by code that may not be run.
    """
    folder = Path(data_path)
    shape = tuple(int(n) for n in read_document(folder)["input_shape"])
    return ServedModel(load(folder, allow_code=os.environ.get("AUTOPRUNE_ALLOW_CODE") == "1"), shape)
