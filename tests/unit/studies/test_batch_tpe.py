"""TPE for many workers proposes what Optuna's own sampler would, several at a time."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler, TPESampler
from optuna.samplers._tpe.parzen_estimator import _ParzenEstimator, _ParzenEstimatorParameters
from optuna.samplers._tpe.sampler import default_weights

from autoprune.studies.sampler import make_sampler
from autoprune.studies.tpe import BatchTPE, _ProductParzen

SPACE: dict[str, BaseDistribution] = {
    "target": FloatDistribution(0.2, 0.8, log=True),
    "ratio": FloatDistribution(0.0, 0.9),
    "narrow": FloatDistribution(0.5, 0.5 + 1e-6),
    "criterion": CategoricalDistribution(["l2", "taylor", "obs"]),
}


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def asked(sampler: BaseSampler, count: int, running: int = 0) -> list[dict[str, object]]:
    """The proposals of a small search that keeps `running` trials unfinished."""
    study = optuna.create_study(directions=["minimize", "minimize"], sampler=sampler)
    flights: list[optuna.trial.Trial] = []
    proposed = []
    for _ in range(count):
        flights.append(study.ask(SPACE))
        proposed.append(dict(flights[-1].params))
        if len(flights) > running:
            trial = flights.pop(0)
            study.tell(trial, [trial.params["target"] + trial.params["ratio"], 1.0 - trial.params["ratio"]])
    return proposed


def test_a_batch_of_one_proposes_what_optunas_sampler_does() -> None:
    theirs = asked(TPESampler(seed=4, multivariate=True, constant_liar=True), 60, running=3)
    ours = asked(BatchTPE(4, 1), 60, running=3)
    assert [list(p) for p in ours] == [list(p) for p in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["criterion"] == other["criterion"]
        assert mine["ratio"] == pytest.approx(other["ratio"], rel=1e-9)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_densities_are_those_of_optunas_estimator(count: int) -> None:
    rng = np.random.default_rng(count)
    seen = {
        "target": rng.uniform(0.2, 0.8, count),
        "ratio": rng.uniform(0.0, 0.9, count),
        "narrow": np.full(count, 0.5),
        "criterion": rng.integers(0, 3, count).astype(float),
    }
    parameters = _ParzenEstimatorParameters(1.0, True, False, default_weights, True)
    theirs, ours = (kind(seen, SPACE, parameters) for kind in (_ParzenEstimator, _ProductParzen))
    drawn = theirs.sample(np.random.RandomState(0), 50)
    np.testing.assert_allclose(ours.log_pdf(drawn), theirs.log_pdf(drawn), rtol=1e-6, atol=1e-6)


def test_whole_numbers_are_left_to_optuna() -> None:
    space: dict[str, BaseDistribution] = {"n": IntDistribution(1, 9), "x": FloatDistribution(0.0, 1.0)}
    seen = {"n": np.array([1.0, 4.0, 9.0]), "x": np.array([0.1, 0.5, 0.9])}
    parameters = _ParzenEstimatorParameters(1.0, True, False, default_weights, True)
    theirs, ours = (kind(seen, space, parameters) for kind in (_ParzenEstimator, _ProductParzen))
    drawn = theirs.sample(np.random.RandomState(0), 20)
    np.testing.assert_array_equal(ours.log_pdf(drawn), theirs.log_pdf(drawn))


def test_one_fit_serves_a_batch_of_different_proposals(monkeypatch: pytest.MonkeyPatch) -> None:
    fits = []
    fit: Callable[..., object] = TPESampler._build_parzen_estimator

    def counted(self: TPESampler, *args: object, **kwargs: object) -> object:
        fits.append(args)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(TPESampler, "_build_parzen_estimator", counted)
    proposed = asked(BatchTPE(0, 8), 10 + 5 * 8)
    assert len(fits) == 2 * 5  # after ten random ones; good and bad trials
    assert len({p["ratio"] for p in proposed}) == len(proposed)
    again = asked(BatchTPE(0, 8), 10 + 5 * 8)
    assert again == proposed


def test_a_batch_learns() -> None:
    def late(sampler: BaseSampler) -> list[float]:
        return [float(str(proposal["target"])) for proposal in asked(sampler, 120)[60:]]

    assert min(late(BatchTPE(1, 8))) < 0.21
    assert np.mean(late(BatchTPE(1, 8))) < np.mean(late(make_sampler("random", 1)))


def test_only_samplers_made_of_tpe_are_batched() -> None:
    assert isinstance(make_sampler("auto", 0, 4), BatchTPE)
    assert isinstance(make_sampler("tpe", 0, 2), BatchTPE)
    assert not isinstance(make_sampler("tpe", 0), BatchTPE)
    assert not isinstance(make_sampler("nsga2", 0, 4), BatchTPE)
