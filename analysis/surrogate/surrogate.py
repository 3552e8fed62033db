"""The model of a sweep: rerouting lost and benign drift over (beta_kl, kl_temperature). It searches, and it decides.

Both are Gaussian processes over all trials (`gaussian_process.py`). A trial that was stopped early is known to have
lost more rerouting than the limit, but not how much, and its drift was not that of a finished one: it enters the
first model alone, with a fixed loss beyond the limit. Runs that failed have no part in it (`failures.py`).
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from analysis.constraint import failed_seeds, fails_often
from analysis.formatting import count
from analysis.surrogate.failures import FAILURE_RATE
from analysis.surrogate.gaussian_process import Mixture, Posterior, fit
from analysis.surrogate.kernel import DRIFT_PRIOR, REROUTE_PRIOR, Array, coordinates
from analysis.surrogate.search_space import DEFAULT_SPACE, SearchSpace

MIN_DRIFT = 1e-12
"""Nats per token; less drift is taken as this, since its logarithm is modelled."""
MAX_MODELLED = 300
"""Trials that the model rests on at most: its cost grows with their cube."""
SUSPECT = 0.5
"""Probability of having failed from which a trial is named, and has no part in a decision."""
_KNOWN_TO_FAIL, _FAILS_WITH_IT, _NEVER_FAILED = 0.999, 0.5, 1e-6
"""Probabilities, before the model, that a baseline failed which never rerouted although others did; that the drift of a
trial is not its setting's where its rerouting is not; and of a stopped trial, whose value is made up."""
_DRIFT_FAILED = float(np.log(2.0))
"""Of the logarithm of drift: what lies within a factor of 2 of what all others say has not failed. Of rerouting it is
the limit: a run that lost less than is allowed against its neighbours has rerouted."""
STOPPED_LOSS = 2.0
"""What a stopped trial is taken to have lost, in units of the limit."""
METRICS = ("eval_loss_reroute", "eval_benign_kl")
BASELINE = coordinates(0.0, 1.0)[0]
"""`[2]`: where the model has every trial at `beta_kl = 0`."""


def finite_trials(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials that count: completed, with finite metrics; and a warning about completed ones without."""
    completed = trials[trials["status"] == "completed"]
    finite = np.isfinite(completed[list(METRICS)].astype(float)).all(axis=1)
    ignored = int((~finite).sum())
    warnings = [f"{count(ignored, 'completed trial')} without finite metrics: ignored."] if ignored else []
    return completed[finite].reset_index(drop=True), warnings


@dataclass(frozen=True)
class Surrogate:
    """Both metrics' posteriors: rerouting in fractions of what the baseline achieved, drift in its logarithm."""

    reroute: Posterior
    drift: Posterior
    limit: float
    """The fraction of rerouting that may be lost."""
    trials: pd.DataFrame
    """The completed trials that it rests on, with `reroute_failed` and `drift_failed`: the probabilities that one
    metric is not what the trial's setting gives."""
    space: SearchSpace

    @classmethod
    def of(
        cls,
        trials: pd.DataFrame,
        reroute_tolerance: float,
        draws: int | None = None,
        space: SearchSpace = DEFAULT_SPACE,
        most: int = MAX_MODELLED,
    ) -> "Surrogate":
        """The model of a sweep's trials, of which at least one at `beta_kl = 0` completed.

        Args:
            trials: columns of `trials.csv`, any status; only completed trials with finite metrics and stopped ones
                count.
            draws: hyper-parameter draws to average over at most; None is all that carry weight.
            space: what is searched; `coordinates` of the same space belong to the model.
            most: trials that it rests on, and as many stopped ones.
        """
        usable, _ = finite_trials(trials)
        usable = modelled(usable, most)
        stopped = trials[(trials["status"] == "stopped") & (trials["beta_kl"] > 0)].tail(most)
        # A fraction of what the baseline achieved has the same scale in every sweep, and the priors rest on that scale.
        # The observed mean only sets origin and unit. It is not taken for the truth: the baseline's own value stays
        # uncertain in the model, and `lost` is the difference to it.
        without_kl = usable.index[usable["beta_kl"] == 0]
        losses = usable.loc[without_kl, "eval_loss_reroute"].astype(float)
        failed = np.array(failed_seeds(losses.tolist()))
        baseline = losses[~failed].mean()
        lost = (usable["eval_loss_reroute"].to_numpy(float) - baseline) / (1 - baseline)
        log_drift = np.log(usable["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT))
        x, x_stopped = (coordinates(rows["beta_kl"], rows["kl_temperature"], space) for rows in (usable, stopped))
        seed, seed_stopped = usable["seed"].to_numpy(), stopped["seed"].to_numpy()
        known = pd.Series(FAILURE_RATE, usable.index)
        known[without_kl[failed]] = _KNOWN_TO_FAIL
        reroute = fit(
            np.concatenate([x, x_stopped]),
            np.concatenate([seed, seed_stopped]),
            np.concatenate([lost, np.full(len(stopped), STOPPED_LOSS * reroute_tolerance)]),
            REROUTE_PRIOR,
            draws,
            np.concatenate([known, np.full(len(stopped), _NEVER_FAILED)]),
            least_failed=reroute_tolerance,
        )
        reroute_failed = reroute.probability_failed()[: len(usable)]
        with_it = np.maximum(FAILURE_RATE, _FAILS_WITH_IT * reroute_failed)
        drift = fit(x, seed, log_drift, DRIFT_PRIOR, draws, with_it, least_failed=_DRIFT_FAILED)
        judged = usable.assign(reroute_failed=reroute_failed, drift_failed=drift.probability_failed())
        return cls(reroute, drift, reroute_tolerance, judged, space)

    @property
    def suspect(self) -> pd.Series:
        """Which of `trials` most likely failed.

        Of a baseline rerouting alone tells: without KL nothing holds drift, which differs from seed to seed by far more
        than at any other setting.
        """
        by_drift = (self.trials["drift_failed"] > SUSPECT) & (self.trials["beta_kl"] > 0)
        return (self.trials["reroute_failed"] > SUSPECT) | by_drift

    @property
    def failed_baselines(self) -> pd.Index:
        """The baselines among `trials` that most likely failed."""
        return self.trials.index[self.suspect & (self.trials["beta_kl"] == 0)]

    def not_to_be_chosen(self) -> set[tuple[float, float]]:
        """The settings that often fail, and those of which every trial so far is suspect."""
        suspect = self.suspect
        counted = suspect.groupby([self.trials["beta_kl"], self.trials["kl_temperature"]]).agg(["sum", "size"])
        return {
            (float(beta_kl), float(heat))
            for (beta_kl, heat), failed, seeds in zip(counted.index, counted["sum"], counted["size"], strict=True)
            if failed == seeds or fails_often(failed, seeds)
        }

    def not_yet_repeated(self) -> list[tuple[float, float, int]]:
        """Settings that ran on one seed, and that trial is suspect: (beta_kl, kl_temperature, seed)."""
        alone = ~self.trials.duplicated(["beta_kl", "kl_temperature"], keep=False)
        rows = self.trials[self.suspect & alone & (self.trials["beta_kl"] > 0)]
        return [*zip(rows["beta_kl"], rows["kl_temperature"], rows["seed"], strict=True)]

    def lost(self, points: Array) -> Mixture:
        """Rerouting lost against the baseline at `points` `[m, 2]`."""
        return self.reroute.difference(points, BASELINE)

    def probability_feasible(self, points: Array) -> Array:
        """`[m]` probabilities that `points` `[m, 2]` lose no more than the limit."""
        return self.lost(points).probability_below(self.limit)

    def log_drift_over(self, points: Array, reference: Array) -> Mixture:
        """Logarithm of the drift at `points` `[m, 2]` over that at `reference` `[2]`, jointly."""
        return self.drift.difference(points, reference)

    def probability_of_qualifying(self, points: Array, seed: int, confidence: float, trials: float = 1) -> Array:
        """`[m]` probabilities that trials on `seed` bring a point to `confidence` of being feasible."""
        return self.reroute.probability_of_qualifying(points, BASELINE, seed, self.limit, confidence, trials)

    def believing_drift(self, points: Array, seed: ArrayLike) -> "Surrogate":
        """The model once the drift of trials that run at `points` `[k, 2]` has come out as it expects."""
        return replace(self, drift=self.drift.believing(points, seed))


def modelled(usable: pd.DataFrame, most: int = MAX_MODELLED) -> pd.DataFrame:
    """The trials that the model rests on: all up to `most`.

    Of more, at even distances in the order in which they ran, the baselines (a quarter of the room at most), settings
    that ran more than once with all their trials (half of what is left, or more where others leave it), and the others.
    """
    if len(usable) <= most:
        return usable
    of_settings = usable[usable["beta_kl"] > 0].groupby(["beta_kl", "kl_temperature"], sort=False).groups.values()
    replicated = [[*trials] for trials in of_settings if len(trials) > 1]
    others = [trials[0] for trials in of_settings if len(trials) == 1]
    kept = _spread([*usable.index[usable["beta_kl"] == 0]], most // 4)
    left = most - len(kept)
    room = max(left // 2, left - len(others))
    by_number = (_spread(replicated, number) for number in range(len(replicated), -1, -1))
    whole = next(settings for settings in by_number if sum(map(len, settings)) <= room)
    kept += [trial for trials in whole for trial in trials]
    kept += _spread(others, most - len(kept))
    return usable.loc[sorted(kept)]


def _spread(items: list[Any], most: int) -> list[Any]:
    """So many of them, or all, at even distances, the last one among them."""
    places = np.linspace(len(items) - 1, 0, min(most, len(items))).astype(int)
    return [items[place] for place in places[::-1]]
