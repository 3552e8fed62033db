"""Where the search looks next. Each suggestion is a function of the sweep's trials and a seed, without a state.

`PosteriorSampler` is an Optuna sampler over the model that will decide (`analysis.surrogate.surrogate`). It maximises

    E[drift saved over the best setting that qualifies] × P(the trials that are left, spent there, make it qualify)

where a setting qualifies when its probability of being feasible reaches the confidence that a recommendation needs.
The second factor is what tells it from expected improvement × P(feasible), which spends a noisy budget on places that
look best and can never be proved. Drift is counted as it is, not by its logarithm: a bet on a far corner can save no
more than all of it. And what is known of beta_kl at one temperature is used: drift falls with it and rerouting is
lost with it, so a weight promises no less than those below it, and proves no more.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from scipy.special import log_ndtr, ndtr

from analysis.constraint import absolute_tolerance, probably_feasible
from analysis.noise import excessive_spread
from analysis.surrogate.gaussian_process import Mixture
from analysis.surrogate.kernel import Array, coordinates
from analysis.surrogate.surrogate import BASELINE, Surrogate, finite_trials, modelled
from sweeps.plan.budget import PlanSettings

BETA_KL, KL_TEMPERATURE = "beta_kl", "kl_temperature"
MIN_MODELLED_TRIALS = 3
"""Completed trials at `beta_kl` > 0 from which the model suggests; with fewer, points are drawn at random."""
SAME_POINT = 0.02
"""Points closer than this share of the searched ranges in both parameters are one point."""
WORTH_A_TRIAL = 0.01
"""Of the drift without KL: a point that is expected to save less is worth no trial as long as the setting that would be
chosen has run on one seed only."""
SIGNIFICANT_DIGITS = 4

_MANY, DRAWS_OF_MANY = 40, 16
"""Trials of a sweep from which on they tell much of the hyper-parameters, and the draws of these that then serve."""
_DRAWS, _MOST = 64, 64
"""Hyper-parameter draws of few trials, and completed (and stopped) trials that a suggestion rests on at most: it takes
no longer, the more a sweep has run."""
_NEWEST = 300
"""Trials that TPE sees, which goes through all of them at each."""
_WEIGHTS, _TEMPERATURES = 64, 7


def search_space(settings: PlanSettings) -> dict[str, BaseDistribution]:
    """Distributions of the two searched parameters; every trial of the searched study carries both, also where one
    has a single value, which Optuna's samplers then leave out of their models."""
    return {
        BETA_KL: FloatDistribution(*settings.beta_kl_range, log=True),
        KL_TEMPERATURE: FloatDistribution(*settings.kl_temperature_range),
    }


def suggest(
    study: optuna.Study, trials: Callable[[], pd.DataFrame], settings: PlanSettings, seed: int
) -> tuple[float, float]:
    """The next (beta_kl, kl_temperature), rounded to what a person can type back.

    Args:
        study: the searched study, settled; trials that run are taken into account.
        trials: gives all trials of the sweep, with the columns of `trials.csv`.
        seed: on which the suggested setting will be trained.
    """
    asked = study.get_trials(deepcopy=False)
    number, completed = len(asked), sum(trial.state == TrialState.COMPLETE for trial in asked)
    draw = int(np.random.SeedSequence([settings.seed, number]).generate_state(1)[0])
    sampler: BaseSampler
    if settings.sampler == "random" or completed < MIN_MODELLED_TRIALS:
        sampler = RandomSampler(seed=draw)
    elif settings.sampler == "tpe":
        sampler = TPESampler(seed=draw, multivariate=True, constant_liar=True, n_startup_trials=MIN_MODELLED_TRIALS)
    else:
        sampler = PosteriorSampler(trials(), settings, seed, draw)
    # TPE writes into the study: it gets a copy.
    newest = optuna.create_study(sampler=sampler)
    if isinstance(sampler, TPESampler):
        newest.add_trials(asked[-_NEWEST:])
    params = newest.ask(search_space(settings)).params
    return (
        _rounded(params[BETA_KL], settings.beta_kl_range),
        _rounded(params[KL_TEMPERATURE], settings.kl_temperature_range),
    )


class PosteriorSampler(BaseSampler):
    """Suggests the point whose next trial is worth most to the decision, given the trials so far."""

    def __init__(self, trials: pd.DataFrame, settings: PlanSettings, seed: int, draw: int = 0) -> None:
        """
        Args:
            trials: columns of `trials.csv`; at least one completed at `beta_kl = 0`. The drift of those that run is
                taken to come out as the model expects, so that trials asked for together do not meet. Their
                rerouting is not: that would make the model sure of what nobody has seen.
            settings: the searched ranges, the tolerance and the confidence.
            seed: on which the point will be trained.
            draw: shifts the grid of points that are compared.
        """
        self._trials = trials
        self._settings = settings
        self._seed = seed
        self._draw = draw

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Both parameters, always."""
        return search_space(self._settings)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """The suggested point."""
        beta_kl, kl_temperature = _most_valuable(self._trials, self._settings, self._seed, self._draw)
        return {BETA_KL: beta_kl, KL_TEMPERATURE: kl_temperature}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """For parameters that the sweep does not know: at random."""
        return RandomSampler(seed=self._draw).sample_independent(study, trial, param_name, param_distribution)


def _most_valuable(trials: pd.DataFrame, settings: PlanSettings, seed: int, draw: int) -> tuple[float, float]:
    """The point of the highest value on a grid that `draw` shifts, or a setting that ran and deserves a second seed."""
    # 1. The model; drift that is still being measured counts as known, see `PosteriorSampler`.
    space, draws = settings.searched, _DRAWS if len(trials) <= _MANY else DRAWS_OF_MANY
    model = Surrogate.of(trials, settings.reroute_tolerance, draws, space, _MOST)
    asked = trials[trials["beta_kl"] > 0]
    running = asked[asked["status"] == "running"]
    if len(running):
        places = coordinates(running["beta_kl"], running["kl_temperature"], space)
        model = model.believing_drift(places, running["seed"])
    # 2. What a new point has to beat: the setting that would be chosen now, or no KL.
    rests_on = modelled(finite_trials(trials)[0], _MOST)
    known = pd.concat([rests_on[rests_on["beta_kl"] > 0], running])
    pick = _pick(model, known, settings)
    reference = BASELINE if pick is None else coordinates(*pick, space)[0]
    left = max(1, settings.num_samples - len(trials))

    def saved_and_proved(points: Array) -> tuple[Array, Array]:
        saved = expected_saving(model.log_drift_over(points, reference))
        return saved, model.probability_of_qualifying(points, seed, settings.confidence, left)

    # 3. A setting whose only trial most likely failed: a second one tells more than any new point.
    if (in_doubt := _in_doubt(model, asked, seed)) is not None:
        return in_doubt
    # 4. The worth of every grid point. Along a row, of one temperature, a larger weight saves no less drift than the
    #    weights below it, and is proved to be feasible no more easily: hence the running maximum and minimum.
    unit = _grid(draw, 1 if space.single_temperature else _TEMPERATURES)
    points = coordinates(*space.from_unit(unit), space)
    saved, proved = (part.reshape(-1, _WEIGHTS) for part in saved_and_proved(points))
    worth = np.maximum.accumulate(saved, axis=1) * np.minimum.accumulate(proved, axis=1)
    taken = space.to_unit(asked["beta_kl"], asked["kl_temperature"])
    apart = np.abs(unit[:, None] - taken).max(axis=2).min(axis=1, initial=np.inf) >= SAME_POINT
    worth = np.where(apart, worth.ravel(), -1)
    # 5. With noisy seeds a second look at few settings tells more than a first at many: a repeat that is worth as much.
    #    And where the whole grid is taken, as it soon is along a single temperature, any repeat.
    again = _not_on(seed, known, asked) if _noisy(trials, settings) or not apart.any() else []
    if again:
        weights, temperatures = np.transpose(again)
        worth_again = np.prod(saved_and_proved(coordinates(weights, temperatures, space)), axis=0)
        if worth_again.max() >= worth.max():
            return again[np.argmax(worth_again)]
    # 6. No point is worth a trial: the pick on its second seed. The factor before `worth` makes a share of the pick's
    #    drift one of the drift without KL.
    seeds = [] if pick is None else _seeds_of(pick, asked)
    if pick is not None and len(seeds) == 1 and seed not in seeds:
        of_pick, of_baseline = model.drift.value(np.stack([reference, BASELINE])).expectation()
        if np.exp(of_pick - of_baseline) * worth.max() < WORTH_A_TRIAL:
            return pick
    # 7. The best point; where the whole grid is taken and every setting ran on this seed, one at random.
    if not apart.any():
        unit, worth = np.random.default_rng(draw).random((1, 2)), np.zeros(1)
    beta_kl, kl_temperature = space.from_unit(unit[[np.argmax(worth)]])
    return float(beta_kl[0]), float(kl_temperature[0])


def _in_doubt(model: Surrogate, asked: pd.DataFrame, seed: int) -> tuple[float, float] | None:
    """A setting that was asked for once, on another seed, where it most likely failed; None where there is none."""
    tried = asked.groupby(["beta_kl", "kl_temperature"]).size()
    for beta_kl, kl_temperature, failed_on in model.not_yet_repeated():
        if failed_on != seed and tried[beta_kl, kl_temperature] == 1:
            return float(beta_kl), float(kl_temperature)
    return None


def _noisy(trials: pd.DataFrame, settings: PlanSettings) -> bool:
    """Whether the baseline's seeds differ by too much for the limit."""
    losses = finite_trials(trials[trials["beta_kl"] == 0])[0]["eval_loss_reroute"].astype(float).tolist()
    return excessive_spread(losses, absolute_tolerance(losses, settings.reroute_tolerance)) is not None


def _not_on(seed: int, known: pd.DataFrame, asked: pd.DataFrame) -> list[tuple[float, float]]:
    """The settings of `known` that no trial of `asked`, failed ones included, has on `seed`, by their weights."""
    here = asked[asked["seed"] == seed]
    tried = set(zip(here["beta_kl"], here["kl_temperature"], strict=True))
    return sorted(set(zip(known["beta_kl"], known["kl_temperature"], strict=True)) - tried)


def _pick(model: Surrogate, ran: pd.DataFrame, settings: PlanSettings) -> tuple[float, float] | None:
    """The setting with the least drift among those that qualify, which would be chosen now; None where none does.

    Settings that still run are among `ran`: the model may know a place before it has a result there.
    """
    points = coordinates(ran["beta_kl"], ran["kl_temperature"], settings.searched)
    drift = model.drift.value(points).expectation()
    qualifies = [probably_feasible(chance, settings.confidence) for chance in model.probability_feasible(points)]
    barred = model.not_to_be_chosen()
    ran_at = zip(ran["beta_kl"], ran["kl_temperature"], strict=True)
    drift[~np.array(qualifies) | [setting in barred for setting in ran_at]] = np.inf
    best = int(np.argmin(drift))
    if not np.isfinite(drift[best]):
        return None
    return float(ran["beta_kl"].iloc[best]), float(ran["kl_temperature"].iloc[best])


def _seeds_of(setting: tuple[float, float], asked: pd.DataFrame) -> set[int]:
    """The seeds on which a setting was asked for."""
    return set(asked.loc[(asked["beta_kl"] == setting[0]) & (asked["kl_temperature"] == setting[1]), "seed"])


def expected_saving(change: Mixture) -> Array:
    """`[m]`: E[max(0, 1 − e^change)], the share of drift that is saved, of a change in its logarithm.

    For a change that is normal with mean μ and standard deviation s it is, with z = −μ / s,

        P(change < 0) − E[e^change; change < 0] = Φ(z) − e^(μ + s²/2) · Φ(z − s)

    averaged over the mixture. The second term is at most 1 and goes by its logarithm: its first factor may overflow
    where its second one vanishes.
    """
    z = -change.mean / change.sd
    log_kept = change.mean + 0.5 * np.square(change.sd) + log_ndtr(z - change.sd)
    return change.weights @ np.maximum(0, ndtr(z) - np.exp(np.minimum(log_kept, 0)))


def _grid(draw: int, temperatures: int) -> Array:
    """`[temperatures × weights, 2]` points of the unit square, their weights shifted together by less than a step.

    The shift differs from trial to trial, so that a sweep can come closer to the limit than a step of the grid.
    """
    weights = (np.arange(_WEIGHTS) + np.random.default_rng(draw).random()) / _WEIGHTS
    pairs = np.meshgrid(weights, np.linspace(0, 1, temperatures))
    return np.stack(pairs, axis=2).reshape(-1, 2)


def _rounded(value: float, bounds: tuple[float, float]) -> float:
    return min(max(float(f"{value:.{SIGNIFICANT_DIGITS}g}"), bounds[0]), bounds[1])
