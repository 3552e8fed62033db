"""A response surface to drive plans with: drift falls as beta_kl grows, rerouting regresses beyond a threshold."""

import math
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pandas as pd
import pytest
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend

import sweeps.plan.plan
from analysis.surrogate.search_space import SearchSpace
from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialOutcome, TrialSpec
from sweeps.plan.plan import SweepPlan

BASELINE_LOSS = 0.011


def completed(loss: float, drift: float = 1.0, harmful_nll: float = 8.0, **metrics: float) -> TrialOutcome:
    return TrialOutcome("completed", drift, loss, harmful_nll, {"base_harmful_nll": 0.5, "loss_kl": 0.1, **metrics})


def true_reroute(beta_kl: float, kl_temperature: float) -> float:
    """Noise-free `eval_loss_reroute`; 5 % of the rerouting achieved is lost at beta · T ≈ 0.23."""
    return BASELINE_LOSS + 0.04 * math.log1p((beta_kl * kl_temperature / 0.15) ** 2)


def world(spec: TrialSpec, noise: float = 0.004) -> TrialOutcome:
    """The outcome of a trial, the same whenever it is run; half of the noise's variance is shared by a seed."""
    own, shared = random.Random(str(spec)), random.Random(spec.seed)
    loss = true_reroute(spec.beta_kl, spec.kl_temperature)
    loss += noise * math.sqrt(0.5) * (own.gauss(0, 1) + shared.gauss(0, 1))
    drift = 0.002 + 9.6 / (1 + (spec.beta_kl * spec.kl_temperature / 0.1) ** 2)
    return completed(min(1.0, max(0.0, loss)), drift * math.exp(0.1 * own.gauss(0, 1)))


def measured(spec):
    outcome = world(spec)
    outcome.metrics.update(train_s=3.0, eval_s=0.5, wall_s=4.0, ended_at=5.0, process="host:1")
    return outcome


def failed(error: str = "out of memory") -> TrialOutcome:
    return TrialOutcome("failed", error=error)


def next_trial(plan: SweepPlan) -> TrialSpec:
    """The trial that the plan gives; for where it must give one."""
    spec = plan.ask()
    assert spec is not None, plan.rows()
    return spec


def drive(
    plan: SweepPlan,
    outcome: Callable[[TrialSpec], TrialOutcome] = world,
    *,
    concurrent: int = 1,
    rng: random.Random | None = None,
) -> list[TrialSpec]:
    """Run the plan to its end, at most `concurrent` trials at a time, ending in random order; the trials asked."""
    rng = rng or random.Random(0)
    asked: list[TrialSpec] = []
    running: list[TrialSpec] = []
    while not plan.done:
        asked += start(plan, running, concurrent)
        assert running, f"nothing runs and nothing is given after {len(asked)} trials"
        spec = running.pop(rng.randrange(len(running)))
        plan.tell(spec.trial_id, outcome(spec))
    return asked


def start(plan: SweepPlan, running: list[TrialSpec], concurrent: int) -> list[TrialSpec]:
    """Ask for trials until so many run or none is given; those that were given."""
    before = len(running)
    while len(running) < concurrent and (spec := plan.ask()) is not None:
        running.append(spec)
    return running[before:]


def use_quick_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cheap stand-ins for the two models of the plan, both functions of the whole history."""
    monkeypatch.setattr(sweeps.plan.plan, "suggest", quick_suggest)
    monkeypatch.setattr(sweeps.plan.plan, "decide", quick_decide)


def quick_suggest(study: optuna.Study, _trials: object, plan_settings: PlanSettings, _seed: int) -> tuple[float, float]:
    seen = [(t.number, t.state, t.params, t.values, t.constraints) for t in study.get_trials(deepcopy=False)]
    draw = random.Random(f"{seen} {plan_settings.seed}")
    return draw.uniform(*plan_settings.beta_kl_range), draw.uniform(*plan_settings.kl_temperature_range)


def quick_decide(
    trials: pd.DataFrame, *, reroute_tolerance: float, confidence: float, searched: SearchSpace, draws: int | None
) -> SimpleNamespace:
    ran = trials[(trials.status == "completed") & (trials.beta_kl > 0)]
    grouped = ran.groupby(["beta_kl", "kl_temperature"])
    found = [
        SimpleNamespace(
            beta_kl=beta_kl,
            kl_temperature=kl_temperature,
            n_seeds=group.seed.nunique(),
            n_failed=0,
            probability_feasible=0.99 if group.eval_loss_reroute.mean() < 0.05 else 0.5,
            drift=group.eval_benign_kl.mean(),
        )
        for (beta_kl, kl_temperature), group in grouped
    ]
    found.sort(key=lambda setting: (setting.probability_feasible < confidence, setting.drift))
    return SimpleNamespace(settings=found)


def plan_of(num_samples: int, storage: BaseStorage | None = None, **options: object) -> SweepPlan:
    return SweepPlan(PlanSettings(num_samples=num_samples, **options), storage)


def file_storage(folder: str | Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(Path(folder) / "study.log")))


def tell_baselines(plan: SweepPlan, *losses: float | None) -> None:
    for loss in losses:
        spec = next_trial(plan)
        plan.tell(spec.trial_id, failed() if loss is None else completed(loss, 9.6))
