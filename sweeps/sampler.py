"""Where the search looks next: constrained Bayesian optimisation over the trials so far, without a state of its own.

Each suggestion is made by a fresh sampler on a copy of the study, so it is a function of the history and the seed
alone: a plan rebuilt from its journal is given what the uninterrupted one would have been given.
"""

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, FloatDistribution

from sweeps.budget import PlanSettings

BETA_KL, KL_TEMPERATURE = "beta_kl", "kl_temperature"
MIN_MODELLED_TRIALS = 3
"""Completed trials from which the Gaussian process suggests; with fewer, points are drawn at random."""
SIGNIFICANT_DIGITS = 4


def search_space(settings: PlanSettings) -> dict[str, BaseDistribution]:
    """Distributions of the two searched parameters; every trial of the searched study carries both."""
    return {
        BETA_KL: FloatDistribution(*settings.beta_kl_range, log=True),
        KL_TEMPERATURE: FloatDistribution(*settings.kl_temperature_range),
    }


def suggest(study: optuna.Study, settings: PlanSettings) -> tuple[float, float]:
    """The next (beta_kl, kl_temperature), rounded to what a person can type back.

    Args:
        study: the searched study; trials that run are taken into account, completed ones need their constraint.
    """
    trials = study.get_trials(deepcopy=False)
    seed = int(np.random.SeedSequence([settings.seed, len(trials)]).generate_state(1)[0])
    sampler = optuna.samplers.GPSampler(
        seed=seed,
        independent_sampler=optuna.samplers.RandomSampler(seed=seed),
        n_startup_trials=MIN_MODELLED_TRIALS,
        deterministic_objective=False,
        warn_independent_sampling=False,
    )
    copy = optuna.create_study(direction=study.direction, sampler=sampler)
    copy.add_trials(trials)
    params = copy.ask(search_space(settings)).params
    return (
        _rounded(params[BETA_KL], settings.beta_kl_range),
        _rounded(params[KL_TEMPERATURE], settings.kl_temperature_range),
    )


def _rounded(value: float, bounds: tuple[float, float]) -> float:
    return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), bounds[0]), bounds[1])
