"""Where the search looks: the model decides, at the limit, and the same history gives the same place."""

from pathlib import Path

import numpy as np
import optuna
import pytest
from simulated import BASELINE_LOSS, drive, file_storage, plan_of, quick_decide, true_reroute, world

import sweeps.plan
from sweeps.budget import PlanSettings
from sweeps.sampler import suggest


def test_suggestions_come_from_the_model_and_gather_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a parameter was drawn at random")

    monkeypatch.setattr(optuna.samplers.RandomSampler, "sample_independent", refuse)
    monkeypatch.setattr(sweeps.plan, "decide", quick_decide)
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
    study = optuna.create_study()
    first = [suggest(study, PlanSettings(seed=seed)) for seed in (3, 3, 4)]
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.FAIL))
    second = suggest(study, PlanSettings(seed=3))
    assert first[0] == first[1]
    assert len({first[0], first[2], second}) == 3, (first, second)


def test_the_search_continues_from_a_journal_as_it_would_have(tmp_path: Path) -> None:
    expected = drive(plan_of(13))
    for spec in expected:
        plan = plan_of(13, file_storage(tmp_path))
        assert plan.ask() == spec
        plan.tell(spec.trial_id, world(spec))
