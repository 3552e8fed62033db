"""Where the search looks: the model decides, at the limit, and the same history gives the same place."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
import pytest
from simulated import BASELINE_LOSS, drive, file_storage, next_trial, plan_of, quick_decide, true_reroute, world

import sweeps.plan.plan
import sweeps.plan.sampler
from analysis.surrogate.gaussian_process import Mixture
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.surrogate import Surrogate
from sweeps.plan.budget import PlanSettings, SamplerName
from sweeps.plan.journal import TrialSpec
from sweeps.plan.plan import SweepPlan
from sweeps.plan.sampler import PosteriorSampler, expected_saving, suggest


def test_suggestions_come_from_the_model_and_gather_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a parameter was drawn at random")

    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", refuse)
    monkeypatch.setattr(sweeps.plan.plan, "decide", quick_decide)
    for concurrent in (1, 3):
        asked = drive(plan_of(20), lambda spec: world(spec, noise=0.001), concurrent=concurrent)
        points = [(s.beta_kl, s.kl_temperature) for s in asked if s.phase == "search"]
        excess = [abs(true_reroute(*point) - BASELINE_LOSS - 0.0495) for point in points]
        near = sum(value < 0.02 for value in excess)
        draw = np.random.default_rng(0)
        uniform = zip(10 ** draw.uniform(-3, np.log10(2), 20_000), draw.uniform(1, 4, 20_000), strict=True)
        share = np.mean([abs(true_reroute(*point) - BASELINE_LOSS - 0.0495) < 0.02 for point in uniform])
        assert near >= 4 > 20 * share, f"{near} of 10 near the limit at random {10 * share:.1f}: {points}"


def test_the_same_sweep_twice_is_the_same() -> None:
    assert drive(plan_of(13)) == drive(plan_of(13))


def test_with_too_few_results_for_the_model_points_are_drawn_by_seed_and_trial_number() -> None:
    def drawn(study: optuna.Study, seed: int) -> tuple[float, float]:
        return suggest(study, refuse_table, PlanSettings(seed=seed), 0)

    study = optuna.create_study()
    first = [drawn(study, seed) for seed in (3, 3, 4)]
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    second = drawn(study, 3)
    assert first[0] == first[1]
    assert len({first[0], first[2], second}) == 3, (first, second)


def refuse_table() -> pd.DataFrame:
    raise AssertionError("the model was asked")


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_optunas_samplers_search_without_the_model_and_are_drawn_alike_each_time(
    sampler: SamplerName, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeps.plan.sampler, "PosteriorSampler", refuse_table)
    monkeypatch.setattr(sweeps.plan.plan, "decide", quick_decide)
    first, again = (drive(plan_of(24, sampler=sampler), concurrent=2) for _ in range(2))
    points = {(spec.beta_kl, spec.kl_temperature) for spec in first if spec.phase == "search"}
    assert first == again
    assert len(points) == sum(spec.phase == "search" for spec in first)


def test_a_suggestion_rests_on_no_more_trials_the_more_a_sweep_has_run(monkeypatch: pytest.MonkeyPatch) -> None:
    modelled: list[pd.DataFrame] = []
    of = Surrogate.of

    def seen(*arguments: Any) -> Surrogate:
        model = of(*arguments)
        modelled.append(model.trials)
        return model

    monkeypatch.setattr(Surrogate, "of", seen)
    monkeypatch.setattr(sweeps.plan.sampler, "_MOST", 14)
    monkeypatch.setattr(sweeps.plan.plan, "decide", quick_decide)
    drive(plan_of(30))
    assert max(map(len, modelled)) == 14
    last = modelled[-1]
    assert (last.beta_kl == 0).sum() == 14 // 4
    # Of the others, late trials count as early ones do.
    assert int(last.trial_id.iloc[-1][1:]) > 20


def test_new_points_lie_apart_also_while_others_run_and_none_is_trained_twice_on_a_seed() -> None:
    asked = [spec for spec in drive(plan_of(16), concurrent=4) if spec.phase in ("ablation", "search")]
    log_range, heat_range = np.log(2 / 1e-3), 3
    points = {(spec.beta_kl, spec.kl_temperature) for spec in asked}
    assert len({(spec.beta_kl, spec.kl_temperature, spec.seed) for spec in asked}) == len(asked)
    assert len(points) >= len(asked) - 2
    for (beta, heat), (other_beta, other_heat) in itertools.combinations(points, 2):
        apart = max(abs(np.log(beta / other_beta)) / log_range, abs(heat - other_heat) / heat_range)
        assert apart >= 0.019, points  # two per cent, and what rounding to four digits takes


def test_a_running_trial_keeps_others_from_its_place() -> None:
    plan = plan_of(20)
    for spec in drive_until_search(plan):
        plan.tell(spec.trial_id, world(spec, noise=0.002))
    first, second = next_trial(plan), next_trial(plan)
    alone = plan_of(20)
    for spec in drive_until_search(alone):
        alone.tell(spec.trial_id, world(spec, noise=0.002))
    assert next_trial(alone) == first
    assert abs(np.log(first.beta_kl / second.beta_kl)) + abs(first.kl_temperature - second.kl_temperature) > 0.1


def drive_until_search(plan: SweepPlan) -> list[TrialSpec]:
    return [next_trial(plan) for _ in range(plan.budget.baseline + plan.budget.ablation)]


def test_where_seeds_differ_too_much_settings_that_ran_are_repeated_on_other_seeds() -> None:
    noisy = drive(plan_of(24), lambda spec: world(spec, noise=0.05))
    quiet = drive(plan_of(24), lambda spec: world(spec, noise=0.002))

    def repeated(asked: list[TrialSpec]) -> int:
        searched = [(s.beta_kl, s.kl_temperature) for s in asked if s.phase in ("ablation", "search")]
        return len(searched) - len(set(searched))

    assert repeated(quiet) <= 2
    assert repeated(noisy) > 1 + repeated(quiet), noisy
    assert len({(s.beta_kl, s.kl_temperature, s.seed) for s in noisy}) == len(noisy), "the same training twice"


def test_it_serves_any_optuna_study() -> None:
    plan = plan_of(13)
    drive(plan)
    trials = plan.table()
    settings = PlanSettings()
    study = optuna.create_study(sampler=PosteriorSampler(trials, settings, seed=0))
    trial = study.ask()
    beta_kl = trial.suggest_float("beta_kl", *settings.beta_kl_range, log=True)
    heat = trial.suggest_float("kl_temperature", *settings.kl_temperature_range)
    other = trial.suggest_float("other", 0, 1)
    assert 0.01 < beta_kl < 1, (beta_kl, heat)
    assert 0 <= other <= 1


def test_the_expected_saving_is_that_of_draws() -> None:
    change = Mixture(
        np.array([[-0.5, 1.0, -9.0], [0.2, 2.0, -9.0]]), np.array([[0.3] * 3, [1.5] * 3]), np.array([0.7, 0.3])
    )
    draws = np.random.default_rng(0).normal(size=(400_000, 1))
    by_draws = sum(
        weight * np.maximum(0, 1 - np.exp(mean + sd * draws)).mean(axis=0)
        for weight, mean, sd in zip(change.weights, change.mean, change.sd, strict=True)
    )
    np.testing.assert_allclose(expected_saving(change), by_draws, atol=2e-3)
    assert expected_saving(change)[2] == pytest.approx(1, abs=2e-3)


def test_the_search_continues_from_a_journal_as_it_would_have(tmp_path: Path) -> None:
    expected = drive(plan_of(13))
    for spec in expected:
        plan = plan_of(13, file_storage(tmp_path))
        assert plan.ask() == spec
        plan.tell(spec.trial_id, world(spec))


class FakeModel:
    """A model that is told what to say, and keeps what it was asked."""

    def __init__(
        self, qualifying: Callable[[np.ndarray], np.ndarray], feasible: dict[float, float], change: float = -1.0
    ) -> None:
        self.change = change
        self.probability_of_qualifying = lambda points, *_: qualifying(points)
        self.drift = self
        self.feasible = {coordinates(beta, 1.0)[0, 0]: p for beta, p in feasible.items()}
        self.references: list[float] = []
        self.believed: list[np.ndarray] = []

    def not_to_be_chosen(self) -> set[tuple[float, float]]:
        return set()

    def not_yet_repeated(self) -> list[tuple[float, float, int]]:
        return []

    def probability_feasible(self, points: np.ndarray) -> np.ndarray:
        return np.array([self.feasible[weight] for weight in points[:, 0]])

    def value(self, points: np.ndarray) -> Mixture:
        return Mixture(-points[None, :, 0], np.ones((1, len(points))), np.ones(1))

    def log_drift_over(self, points: np.ndarray, reference: np.ndarray) -> Mixture:
        self.references.append(float(reference[0]))
        return Mixture(np.full((1, len(points)), self.change), np.full((1, len(points)), 0.1), np.ones(1))

    def believing_drift(self, points: np.ndarray, _: object) -> "FakeModel":
        self.believed.append(points)
        return self


def suggested(monkeypatch: pytest.MonkeyPatch, model: FakeModel, statuses: dict[float, str], seed: int = 1) -> float:
    """The weight that is suggested for a seed after trials of these weights and statuses at T = 1 on seed 0."""
    monkeypatch.setattr(sweeps.plan.sampler.Surrogate, "of", lambda *_: model)
    rows = [{"beta_kl": beta, "status": status, "seed": 0} for beta, status in [(0.0, "completed"), *statuses.items()]]
    trials = pd.DataFrame(rows).assign(kl_temperature=1.0, eval_loss_reroute=0.01, eval_benign_kl=1.0)
    trial = optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING)
    sampler = PosteriorSampler(trials, PlanSettings(), seed=seed)
    return sampler.sample_relative(optuna.create_study(), trial, {})["beta_kl"]


def test_a_weight_proves_no_more_than_the_weights_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dip, end = coordinates([0.1, 1.0], [1.0, 1.0])[:, 0]

    def qualifying(points: np.ndarray) -> np.ndarray:
        return np.where(points[:, 0] < dip, 0.5 + 0.1 * points[:, 0], np.where(points[:, 0] < end, 0.1, 1.0))

    beta_kl = suggested(monkeypatch, FakeModel(qualifying, {0.3: 0.5}), {0.3: "completed"})
    assert beta_kl < 0.1, f"{beta_kl} lies beyond what is known to be infeasible"


def test_the_saving_is_counted_over_the_best_setting_that_qualifies(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(lambda points: np.ones(len(points)), {0.01: 0.99, 0.1: 0.97, 0.5: 0.6})
    suggested(monkeypatch, model, dict.fromkeys((0.01, 0.1, 0.5), "completed"))
    assert model.references == [coordinates(0.1, 1.0)[0, 0]]
    none = FakeModel(lambda points: np.ones(len(points)), {0.5: 0.6})
    suggested(monkeypatch, none, {0.5: "completed"})
    assert none.references == [0.0], "the baseline"


def test_where_no_point_is_worth_a_trial_the_pick_runs_on_a_second_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    def after(change: float, seed: int = 1) -> float:
        model = FakeModel(lambda points: np.ones(len(points)), {0.1: 0.97, 0.5: 0.6}, change)
        return suggested(monkeypatch, model, {0.1: "completed", 0.5: "completed"}, seed)

    pays, does_not = -0.5, 0.3  # change of the logarithm of the pick's drift, which is half of that without KL
    assert after(pays) not in (0.1, 0.5)
    assert after(does_not) == 0.1
    assert after(does_not, seed=0) not in (0.1, 0.5), "the same training twice"


def test_a_pick_on_two_seeds_is_left_to_the_confirmation() -> None:
    asked = drive(plan_of(24), lambda spec: world(spec, noise=0.002))
    searched = [(s.beta_kl, s.kl_temperature) for s in asked if s.phase in ("ablation", "search")]
    assert max(searched.count(setting) for setting in searched) <= 2, searched


def test_the_drift_of_running_trials_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(lambda points: np.ones(len(points)), {0.1: 0.97, 0.2: 0.5})
    suggested(monkeypatch, model, {0.1: "completed", 0.2: "running"})
    assert [points.tolist() for points in model.believed] == [coordinates(0.2, 1.0).tolist()]
    assert model.references == [coordinates(0.1, 1.0)[0, 0]]
