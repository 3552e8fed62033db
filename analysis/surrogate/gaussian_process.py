"""A Gaussian process over (beta_kl, kl_temperature) with a seed effect, averaged over its hyper-parameters.

The model of one metric y; the same model searches and decides:

    y = level + f(x) + g(seed) + noise

f has a Matérn 5/2 kernel with a length scale for each coordinate and a linear trend, g is one independent shift a seed
(trials of one seed share an error), the level is constant with a wide prior. Hyper-parameters are not fitted but
averaged over with weights proportional to prior × marginal likelihood: a plug-in optimum is over-confident at twenty
trials. The draws come from fixed quasi-random numbers, so the same data give the same posterior.

Letters below: n observations, m points, D draws of the hyper-parameters `theta` (logarithms, as in `kernel.py`). Under
each draw everything is normal and has a closed form; the weighted draws together are the mixture that is returned.
With K = L Lᵀ the covariance of the n observations, k that of one point with them, and v the point's prior variance:

    mean = k K⁻¹ (y − offset) + offset,    variance = v − k K⁻¹ kᵀ = v − ‖L⁻¹ kᵀ‖²
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

from analysis.surrogate.failures import FAILURE_RATE, Failures, explained
from analysis.surrogate.hyper_parameters import hyper_parameters
from analysis.surrogate.kernel import (
    JITTER,
    Array,
    Flags,
    Prior,
    Seeds,
    covariance,
    inverse_factors,
    observed_covariance,
    variance,
)

_MAX_LEARNT_FROM = 80
_MAX_DRAWS_OF_MANY = 64


@dataclass(frozen=True)
class Mixture:
    """Normal mixtures at m points: `mean`, `sd` `[draws, m]`, `weights` `[draws]` that sum to 1."""

    mean: Array
    sd: Array
    weights: Array

    def expectation(self) -> Array:
        """`[m]` posterior means."""
        return self.weights @ self.mean

    def probability_below(self, limit: ArrayLike) -> Array:
        """`[m]` probabilities of lying at or below `limit` (a number, or one a point)."""
        chance: Array = np.clip(self.weights @ ndtr((np.asarray(limit) - self.mean) / self.sd), 0, 1)
        return chance

    def quantile(self, probability: float) -> Array:
        """`[m]` quantiles, by bisection to about 1e-9 of the mixtures' spread."""
        width = 8 * self.sd  # no component has any mass that counts beyond it
        low, high = (self.mean - width).min(axis=0), (self.mean + width).max(axis=0)
        for _ in range(40):
            middle = (low + high) / 2
            below = self.probability_below(middle) < probability
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        quantile: Array = (low + high) / 2
        return quantile


@dataclass(frozen=True)
class Posterior:
    """The fitted model: n observations under the D hyper-parameter draws that carry weight."""

    x: Array
    seed: Seeds
    """`[n]` labels; observations of one label share an error."""
    theta: Array
    weights: Array
    level: float
    failed: Flags
    """`[D, n]` whether an observation is taken to have failed, and then has no part in anything."""
    whitening: Array
    """`[D, n, n]` inverse Cholesky factors of the covariance of y; 0 in rows and columns of what failed."""
    alpha: Array
    """`[D, n]` covariance⁻¹ (y − offset); 0 at what failed."""
    offset: float

    def value(self, points: Array) -> Mixture:
        """level + f at `points` `[m, 2]`: what a run would give on average over seeds."""
        cross = covariance(points, self.x, self.theta) + self.level**2
        prior_variance = variance(points, self.theta) + self.level**2
        return self._condition(cross, prior_variance, self.offset)

    def difference(self, points: Array, reference: Array) -> Mixture:
        """f at `points` `[m, 2]` minus f at `reference` `[2]`, jointly: level and what both share cancel."""
        return self._difference(points, reference, covariance(points, self.x, self.theta))[0]

    def probability_failed(self) -> Array:
        """`[n]` probabilities that each observation failed."""
        probability: Array = self.weights @ self.failed
        return probability

    def seed_and_noise_variance(self) -> tuple[float, float]:
        """Posterior medians of the variance that trials of a seed share and of what is left, in units of y²."""
        medians = [_weighted_median(self.theta[:, column], self.weights) for column in (3, 4)]
        return math.exp(2 * medians[0]), math.exp(2 * medians[1])

    def probability_of_qualifying(
        self, points: Array, reference: Array, seed: int, limit: float, confidence: float, trials: float = 1
    ) -> Array:
        """Probability that more trials at a point prove its difference to the reference to be within `limit`.

        That is, that P(difference ≤ limit) reaches `confidence` once y is known there: what a trial that is yet to
        run can be expected to bring to a decision at that confidence. `[m]` for `points` `[m, 2]`. An approximation:
        hyper-parameters are averaged over outside, as if the trials told nothing of them (off by up to 0.07 against
        simulated trials).

        Args:
            seed: the label of those trials.
            trials: how many; their own noise is that of the mean.
        """
        # Let Δ = f(point) − f(reference), and y the mean of the trials: level + f(point) + g(seed) + noise.
        # 1. What the n observations say of Δ: its posterior mean and variance (`spread`).
        to_data, own = covariance(points, self.x, self.theta), variance(points, self.theta)
        difference, cross, to_reference = self._difference(points, reference, to_data)
        seed_variance, noise_variance = np.exp(2 * self.theta[:, 3:4]), np.exp(2 * self.theta[:, 4:5])
        # 2. Covariances of y and of Δ with the observations. Multiplied by L⁻¹, their products are what the
        #    observations explain, which is taken off the prior: Cov(y, Δ | data) and Var(y | data).
        of_y = to_data + self.level**2 + seed_variance[:, :, None] * (self.seed == seed)
        of_y, of_difference = (part @ self.whitening.transpose(0, 2, 1) for part in (of_y, cross))
        shared = own - to_reference - (of_y * of_difference).sum(axis=2)
        without_noise = own + self.level**2 + seed_variance - np.square(of_y).sum(axis=2)
        y_variance = np.maximum(without_noise, 0) + noise_variance / trials
        # 3. Seeing y takes Cov² / Var(y) off the variance of Δ, and moves its mean by a normal of just that variance.
        spread = np.square(difference.sd)
        learnt = np.minimum(np.square(shared) / y_variance, spread * (1 - JITTER))
        # 4. The point qualifies where the new mean + z · new sd ≤ limit. The new sd is known before y is, so this
        #    bounds the new mean, whose distribution step 3 gives.
        bound = limit - difference.mean - ndtri(confidence) * np.sqrt(spread - learnt)
        chance: Array = self.weights @ ndtr(bound / np.sqrt(np.maximum(learnt, JITTER * spread)))
        return chance

    def believing(self, x: Array, seed: ArrayLike) -> "Posterior":
        """The model once trials at `x` `[k, 2]` have come out as it expects: means stay, spread shrinks."""
        x, labels = np.concatenate([self.x, x]), np.concatenate([self.seed, np.asarray(seed)])
        more = ((0, 0), (0, len(labels) - self.alpha.shape[1]))
        # An observation that equals its prediction moves no mean: K⁻¹ (y − offset) stays, with 0 in its place.
        failed, alpha = np.pad(self.failed, more), np.pad(self.alpha, more)
        whitening = _whitening(observed_covariance(x, labels, self.theta, self.level), failed)
        return replace(self, x=x, seed=labels, failed=failed, whitening=whitening, alpha=alpha)

    def _difference(self, points: Array, reference: Array, to_data: Array) -> tuple[Mixture, Array, Array]:
        """`difference`, its prior covariance with the data `[D, m, n]`, and that of f with the reference `[D, m]`."""
        # Cov(f(point) − f(reference), y_i) is the difference of two rows. The level would stand in both, and cancels;
        # g(seed) and noise have no part in f. So an error that baseline and trial share is not counted as a loss.
        to_reference = covariance(points, reference[None], self.theta)[:, :, 0]
        cross = to_data - covariance(reference[None], self.x, self.theta)
        own = variance(points, self.theta) + variance(reference[None], self.theta)
        return self._condition(cross, own - 2 * to_reference, 0.0), cross, to_reference

    def _condition(self, cross: Array, prior_variance: Array, offset: float) -> Mixture:
        mean = np.einsum("dmn,dn->dm", cross, self.alpha) + offset
        explained = np.square(cross @ self.whitening.transpose(0, 2, 1)).sum(axis=2)
        # Where the data leave next to no variance, rounding may take it below 0.
        floor = JITTER * np.exp(2 * self.theta[:, 2:3])
        return Mixture(mean, np.sqrt(np.maximum(prior_variance - explained, floor)), self.weights)


def fit(
    x: Array,
    seed: ArrayLike,
    y: ArrayLike,
    prior: Prior,
    draws: int | None = None,
    probability_failed: ArrayLike = FAILURE_RATE,
    least_failed: float = 0.0,
) -> Posterior:
    """Average the model over its hyper-parameters, given n ≥ 1 observations.

    Args:
        x: `[n, 2]` from `coordinates`.
        seed: `[n]` labels; trials with one label share an error.
        y: `[n]` finite values of one metric, on the scale that `prior` is meant for.
        draws: hyper-parameter draws to keep at most, resampled by weight; None keeps all that carry weight.
        probability_failed: that an observation failed, before y is seen; a number, or `[n]`.
        least_failed: how far from what all others say a failed observation lies at least.

    The draws come in rounds, each proposed from the weighted draws so far, and are weighted against the mixture of
    all proposals: twenty trials pin the noise far more narrowly than its prior, which draws from it alone would miss.
    Of many observations 80, at even distances in their order, serve for the hyper-parameters, and all for the rest.
    """
    x, labels, centred = np.asarray(x), np.asarray(seed), np.asarray(y, dtype=float)
    offset = float(centred.mean())  # the prior mean of the level
    centred = centred - offset
    # Memory grows with D · n², time with D · n³: of many observations fewer draws.
    if len(x) > _MAX_LEARNT_FROM:
        draws = min(draws or _MAX_DRAWS_OF_MANY, _MAX_DRAWS_OF_MANY)
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MAX_LEARNT_FROM)).astype(int))
    failures = Failures(
        np.broadcast_to(np.asarray(probability_failed, float), centred.shape), prior.failed_density, least_failed
    )
    theta, weights = hyper_parameters(x[some], labels[some], centred[some], prior, failures.of(some), draws)
    observed = observed_covariance(x, labels, theta, prior.level)
    _, failed = explained(observed, centred, failures)
    whitening = _whitening(observed, failed)
    alpha = np.einsum("dij,di->dj", whitening, whitening @ centred)  # L⁻ᵀ (L⁻¹ y) = K⁻¹ y
    return Posterior(x, labels, theta, weights, prior.level, failed, whitening, alpha, offset)


def _whitening(observed: Array, failed: Flags) -> Array:
    """`[D, n, n]` inverse Cholesky factors L⁻¹ of the covariances of y, without the rows and columns of what failed."""
    counts = ~failed
    # What failed gets a variance of 1 and no covariance, so that factor and inverse leave the others as they are.
    others = observed * (counts[:, :, None] & counts[:, None, :]) + np.eye(observed.shape[1]) * failed[:, :, None]
    return inverse_factors(others) * counts[:, :, None]


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), 0.5)])
