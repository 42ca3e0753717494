"""The files that make a folder with a pruned model loadable by MLflow.

Decides what `MLmodel` says: which of our modules loads the folder, the shapes that go in and come out, and what must be
installed. No pickle is written: the loader builds the network from its class and fills in the safetensors. The file is
written in its documented format (YAML, of which JSON is a part), as importing `mlflow.pyfunc` takes seconds. Must not
know how models are built.
"""

from __future__ import annotations

import datetime
import json
import platform
import uuid
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from autoprune.tracking import records

EXAMPLE = "input_example.json"
SERVING = "serving_input_example.json"
_PACKAGES = ("autoprune", "torch", "torchvision", "numpy", "safetensors")


def flavour_files(run_id: str, *, loader: str, input_shape: Sequence[int], outputs: int | None) -> dict[str, str]:
    """Returns `MLmodel`, an input example and the requirements, as text by file name.

    Args:
        run_id: The run whose artifact `model/` the folder becomes.
        loader: The module with `_load_pyfunc(folder)`, such as `autoprune.network.serving`.
        input_shape: Shape of one sample, the batch left out.
        outputs: Length of the output's second dimension; `None` where the output is no matrix of logits.
    """
    model = {
        "artifact_path": records.MODEL_FOLDER,
        "flavors": {
            "python_function": {
                "loader_module": loader,
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
                "streamable": False,
            }
        },
        "mlflow_version": metadata.version("mlflow"),
        "model_uuid": uuid.uuid4().hex,
        "run_id": run_id,
        "saved_input_example_info": {"artifact_path": EXAMPLE, "type": "ndarray", "serving_input_path": SERVING},
        "signature": {
            "inputs": _tensors([-1, *input_shape]),
            "outputs": _tensors([-1, outputs]) if outputs else None,
            "params": None,
        },
        "utc_time_created": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S.%f"),
    }
    example = _zeros([1, *input_shape])
    environment = {
        "python": platform.python_version(),
        "build_dependencies": ["pip"],
        "dependencies": ["-r requirements.txt"],
    }
    return {
        "MLmodel": json.dumps(model, indent=1) + "\n",
        EXAMPLE: json.dumps(example) + "\n",
        SERVING: json.dumps({"inputs": example}) + "\n",
        "requirements.txt": "\n".join(_requirements()) + "\n",
        "python_env.yaml": json.dumps(environment, indent=1) + "\n",
    }


def _tensors(shape: Sequence[int]) -> str:
    return json.dumps([{"type": "tensor", "tensor-spec": {"dtype": "float32", "shape": list(shape)}}])


def _zeros(shape: Sequence[int]) -> Any:
    return 0.0 if not shape else [_zeros(shape[1:]) for _ in range(shape[0])]


def _requirements() -> list[str]:
    """Returns the versions at hand, without a local part such as `+cpu`, which no index knows."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name}=={metadata.version(name).partition('+')[0]}")
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            found.append(name)
    return found
