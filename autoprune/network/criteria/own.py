"""Criteria of the user's own: a function `package.module:function` that scores the channels of a group.

Decides what such a function is given, what it must return, and what its cached scores depend on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoprune.errors import PolicyError
from autoprune.network.calibration.layer_inputs import rows_of
from autoprune.network.criteria.inputs import PRODUCERS, ChannelCriterion, Criterion, Evidence, Scores, relative
from autoprune.network.graph.groups import PruningGroup, positions_in
from autoprune.network.models.building import import_factory
from autoprune.network.models.checkpoints import file_digest


def own_criterion(path: str) -> ChannelCriterion:
    """Returns the user's function `package.module:function` as a criterion.

    The function is called once a group as `function(weights, inputs)` and returns one score a channel, `(n,)`, higher
    means keep: a tensor, an array or a list.

    - `weights`: path of each layer that makes the group's channels → its weight as `(n, k)` float32, row i the `k`
      numbers that make channel i.
    - `inputs`: path of each layer that reads them → second moments `(n, n)` float32 of the channels there on
      calibration images (mean over kernel positions); empty where there are no images.

    Scores are made relative to their mean, as those of every other criterion. It needs nothing (it runs without images
    too), and gets neither targets nor gradients. It is not called again on weights that training has changed.

    Raises:
        InputError: The function cannot be imported.
    """
    function = import_factory(path, what="criterion")

    def scores(evidence: Evidence, group: PruningGroup) -> Scores:
        found = function(_weights_of(evidence, group), _inputs_of(evidence, group))
        values = np.asarray(found.detach().cpu() if isinstance(found, Tensor) else found)
        if values.shape != (group.size,) or values.dtype.kind not in "fiub":
            raise PolicyError(
                f"criterion {path!r} returns {values.dtype} of shape {values.shape} for group {group.name!r};"
                f" it must return {group.size} numbers, shape ({group.size},)"
            )
        numbers = values.astype(np.float64)
        return relative(numbers) if np.isfinite(numbers).all() else numbers  # `score` refuses these by name

    return Criterion(path, scores)


def _weights_of(evidence: Evidence, group: PruningGroup) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for links in evidence.uses(group, PRODUCERS):
        rows = rows_of(links, evidence.parameter(links.layer.weight)).float().cpu()
        places = positions_in(links.outputs, group)
        index = np.flatnonzero(places >= 0)
        index = index[np.argsort(places[index], kind="stable")]
        picked = rows[torch.from_numpy(index)]
        channels = len(np.unique(places[index]))
        if channels == group.size and len(index) % group.size == 0:
            found[links.module] = picked.reshape(group.size, -1)
    return found


def _inputs_of(evidence: Evidence, group: PruningGroup) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for links in evidence.consumers(group):
        assert links.inputs is not None
        moments = evidence.statistics[links.site]
        places = positions_in(links.inputs, group)
        own = np.flatnonzero(places >= 0)
        own = own[np.argsort(places[own], kind="stable")]
        if len(own) != group.size or len(np.unique(places[own])) != group.size:
            continue  # a flattened map, or only a part of the group
        k = moments.kernel
        pixels = moments.gram.sum(0).reshape(-1, k, moments.gram.shape[2] // k, k).diagonal(dim1=1, dim2=3).mean(-1)
        index = torch.from_numpy(own)
        found[links.site] = pixels.cpu()[index][:, index].float()
    return found


def criteria_key(names: Sequence[str]) -> list[Any]:
    """Returns what the scores of the named criteria depend on: an own function's module is read, as it may change."""
    return [[name, _source(name)] if ":" in name else name for name in names]


def _source(path: str) -> str:
    file = inspect.getsourcefile(import_factory(path, what="criterion"))
    return file_digest(file) if file is not None else ""
