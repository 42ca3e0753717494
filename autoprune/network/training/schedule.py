"""Schedule: in which stages the epochs of a rung are spent, and where between them the network is cut.

Decides the order: a regularised stage on the dense network (where the recipe has one), then the cuts, each followed by
its share of the fine-tuning. The epochs of all stages add up to the rung's, so that schedules compare fairly. Every cut
is real surgery on the network as it has become, so later stages are cheaper. How a network is trained and repaired is
handed in; knows nothing of data, scores of policies, or results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from autoprune.network.criteria.channels import CRITERIA, choose, score
from autoprune.network.criteria.inputs import Evidence, Scores
from autoprune.network.graph.copies import deep_copy
from autoprune.network.graph.labels import Labels
from autoprune.network.graph.network import Network
from autoprune.network.surgery.cut import cut
from autoprune.network.surgery.narrowing import narrowed
from autoprune.network.surgery.selection import Selection
from autoprune.network.training.recipe import History, Recipe, Stage
from autoprune.network.training.regularisation import regulariser_of


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a policy says, with the scores behind it: group → criterion, scores `(n,)` and width."""

    criteria: Mapping[str, str]
    scores: Mapping[str, Scores]
    widths: Mapping[str, int]

    def selection(self, done: float = 1.0) -> Selection:
        """Returns the channels that stay when the fraction `done` of the way from dense to the widths is gone."""
        found: dict[str, Labels] = {}
        for name, scores in self.scores.items():
            gone = round((len(scores) - self.widths[name]) * done)
            if gone:
                found[name] = choose(scores, len(scores) - gone)
        return found

    def renewed(self, network: Network) -> Ranking:
        """Returns the ranking with the scores that `network.model` now has, where a criterion needs weights alone."""
        chosen = set(self.criteria.values())
        wanted = sorted(name for name, criterion in CRITERIA.items() if criterion.weights_alone and name in chosen)
        fresh = score(Evidence(network), wanted)
        scores = {name: fresh[c][name] if c in fresh else self.scores[name] for name, c in self.criteria.items()}
        return replace(self, scores=scores)


@dataclass(frozen=True, slots=True)
class Tools:
    """How a schedule trains, repairs and watches.

    `train` gets a model, the stage and the stage's number. `repair` gets the network that was cut, the smaller model
    and what stayed of that network, and changes the model. `watch` is told of the last cut, bare and repaired. `alter`
    changes the model of the first cut before it is repaired, such as its activations; later cuts are made from it.
    """

    train: Callable[[nn.Module, Stage, int], History]
    repair: Callable[[Network, nn.Module, Selection], None]
    watch: Callable[[str, nn.Module], None]
    alter: Callable[[nn.Module], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The finished network, the channels of the dense network that it holds, and the history of all stages."""

    model: nn.Module
    selection: Selection
    history: History


def run_schedule(network: Network, ranking: Ranking, recipe: Recipe, tools: Tools) -> Outcome:
    """Prunes and fine-tunes a copy of `network.model` as `recipe.regularisation` and `recipe.schedule` say.

    The widths fall linearly over the cuts, the last one reaching the policy's exactly; the channels of an earlier cut
    are the first to go by the same scores, so choices are nested. The learning rate runs over all stages as over one
    training.
    """
    histories: list[History] = []
    current, begin = network, 0.0
    if recipe.regularisation is not None:
        begin = recipe.regularisation.share
        current = replace(network, model=deep_copy(network.model))
        regulariser = regulariser_of(current, ranking.selection(), recipe.regularisation)
        histories.append(tools.train(current.model, Stage(0.0, begin, regulariser), 0))
        ranking = ranking.renewed(current)
    cuts = 1 if recipe.schedule is None else recipe.schedule.steps
    between = 0.0 if recipe.schedule is None else recipe.schedule.share / (cuts - 1)
    before: Selection = {}
    for number in range(1, cuts + 1):
        selection = ranking.selection(number / cuts)
        stay = renumbered(current, before, selection)
        model = cut(current, stay)
        if number == 1:
            tools.alter(model)
        if number == cuts:
            tools.watch("pruned", model)
        tools.repair(current, model, stay)
        if number == cuts:
            tools.watch("recalibrated", model)
        end = 1.0 if number == cuts else begin + between
        histories.append(tools.train(model, Stage(begin, end), number))
        current, before, begin = narrowed(current, stay, model), selection, end
    return Outcome(current.model, before, _joined(histories))


def _joined(histories: list[History]) -> History:
    return History(
        tuple(value for history in histories for value in history.train_loss),
        tuple(value for history in histories for value in history.val_accuracy),
        tuple(value for history in histories for value in history.lr),
        sum(history.seconds for history in histories),
        sum(history.replayed for history in histories),
        tuple(dict.fromkeys(note for history in histories for note in history.notes)),
    )


def renumbered(network: Network, before: Selection, after: Selection) -> Selection:
    """Returns `after`, a selection of the dense network's channels, in the numbering of `network`.

    Args:
        network: The network that was cut to `before`.
        before: The dense channels that it holds; groups that are left out are whole.
        after: The dense channels that are to stay, a subset of `before`.
    """
    found: dict[str, Labels] = {}
    for name, kept in after.items():
        held = before[name] if name in before else np.arange(network.group(name).size)
        if len(kept) < len(held):
            found[name] = np.searchsorted(held, kept)
    return found
