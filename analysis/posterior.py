"""A Gaussian process over (beta_kl, kl_temperature) with a seed effect, averaged over its hyper-parameters.

The model of one metric y (DESIGN: the same model searches and decides):

    y = level + f(x) + g(seed) + noise

f has a Matérn 5/2 kernel with a length scale for each coordinate, g is one independent shift a seed (trials of one
seed share an error), the level is constant with a wide prior. Hyper-parameters are not fitted but averaged over with
weights proportional to prior × marginal likelihood: a plug-in optimum is over-confident at twenty trials. The draws
come from fixed quasi-random numbers, so the same data give the same posterior.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri
from scipy.stats import qmc

Array = NDArray[np.float64]

BETA_KL_RANGE = (1e-3, 2.0)
"""The search space in beta_kl; its upper end is 1 in the first model coordinate."""
KL_TEMPERATURE_RANGE = (1.0, 4.0)
"""The search space in kl_temperature; 0 to 1 in the second model coordinate."""

_BETA_KL_OFFSET = 1e-4
_DRAWS = 64
_ROUNDS = 8
_MIN_EFFECTIVE = 12.0
_INFLATION = 1.3
_NEGLIGIBLE = 1e-4
_JITTER = 1e-10
_BLOCK_ELEMENTS = 4_000_000


@dataclass(frozen=True)
class Prior:
    """Log-normal priors of the hyper-parameters, each (median, standard deviation of the logarithm).

    Length scales are in units of the search space (`coordinates`), all else in units of y.
    """

    signal: tuple[float, float]
    seed: tuple[float, float]
    noise: tuple[float, float]
    level: float
    length_beta: tuple[float, float] = (0.4, 0.7)
    length_temperature: tuple[float, float] = (1.0, 0.7)

    def log_medians_and_sds(self) -> tuple[Array, Array]:
        """`[5]` each, in the order length_beta, length_temperature, signal, seed, noise."""
        pairs = (self.length_beta, self.length_temperature, self.signal, self.seed, self.noise)
        return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


REROUTE_PRIOR = Prior(signal=(0.15, 1.0), seed=(0.005, 1.3), noise=(0.006, 1.3), level=1.0)
"""For rerouting lost as a fraction of what the baseline achieved (noise from about 4e-4 to 0.1)."""
DRIFT_PRIOR = Prior(signal=(1.5, 0.6), seed=(0.1, 0.9), noise=(0.15, 0.8), level=5.0)
"""For the logarithm of benign drift."""


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
        return np.clip(self.weights @ ndtr((np.asarray(limit) - self.mean) / self.sd), 0, 1)

    def quantile(self, probability: float) -> Array:
        """`[m]` quantiles, by bisection to about 1e-9 of the mixtures' spread."""
        width = 8 * self.sd
        low, high = (self.mean - width).min(axis=0), (self.mean + width).max(axis=0)
        for _ in range(40):
            middle = (low + high) / 2
            below = self.probability_below(middle) < probability
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


@dataclass(frozen=True)
class Posterior:
    """The fitted model: n observations under the D hyper-parameter draws that carry weight."""

    x: Array
    theta: Array
    weights: Array
    level: float
    whitening: Array
    """`[D, n, n]` inverse Cholesky factors of the covariance of y."""
    alpha: Array
    """`[D, n]` covariance⁻¹ (y − offset)."""
    offset: float

    def value(self, points: Array) -> Mixture:
        """level + f at `points` `[m, 2]`: what a run would give on average over seeds."""
        cross = _matern(points, self.x, self.theta) + self.level**2
        prior_variance = np.exp(2 * self.theta[:, 2:3]) + self.level**2
        return self._condition(cross, prior_variance, self.offset)

    def difference(self, points: Array, reference: Array) -> Mixture:
        """f at `points` `[m, 2]` minus f at `reference` `[2]`, jointly: level and what both share cancel."""
        at_reference = _matern(points, reference[None], self.theta)[:, :, 0]
        prior_variance = 2 * (np.exp(2 * self.theta[:, 2:3]) - at_reference)
        return self._condition(self._cross_difference(points, reference), prior_variance, 0.0)

    def seed_and_noise_variance(self) -> tuple[float, float]:
        """Posterior medians of the variance that trials of a seed share and of what is left, in units of y²."""
        medians = [_weighted_median(self.theta[:, column], self.weights) for column in (3, 4)]
        return math.exp(2 * medians[0]), math.exp(2 * medians[1])

    def _cross_difference(self, points: Array, reference: Array) -> Array:
        return _matern(points, self.x, self.theta) - _matern(reference[None], self.x, self.theta)

    def _condition(self, cross: Array, prior_variance: Array, offset: float) -> Mixture:
        mean = np.einsum("dmn,dn->dm", cross, self.alpha) + offset
        explained = np.square(cross @ self.whitening.transpose(0, 2, 1)).sum(axis=2)
        floor = _JITTER * np.exp(2 * self.theta[:, 2:3])
        return Mixture(mean, np.sqrt(np.maximum(prior_variance - explained, floor)), self.weights)


def coordinates(beta_kl: ArrayLike, kl_temperature: ArrayLike) -> Array:
    """`[n, 2]` model coordinates, about 0 to 1 over the search space.

    The first is log(1 + beta_kl / 1e-4): 0 at the baseline, the logarithm over the search space, whose lower end
    stands a quarter of a unit off the baseline, so that KL which costs rerouting at any weight can be told.
    Temperature is inert at `beta_kl = 0`, so every baseline lies at one point.
    """
    beta = np.atleast_1d(np.asarray(beta_kl, dtype=float))
    temperature = np.where(beta == 0, 1.0, np.asarray(kl_temperature, dtype=float))
    span = math.log1p(BETA_KL_RANGE[1] / _BETA_KL_OFFSET)
    cold, hot = KL_TEMPERATURE_RANGE
    return np.stack([np.log1p(beta / _BETA_KL_OFFSET) / span, (temperature - cold) / (hot - cold)], axis=1)


def fit(x: Array, seed: ArrayLike, y: ArrayLike, prior: Prior) -> Posterior:
    """Average the model over its hyper-parameters, given n ≥ 1 observations.

    Args:
        x: `[n, 2]` from `coordinates`.
        seed: `[n]` labels; trials with one label share an error.
        y: `[n]` finite values of one metric, on the scale that `prior` is meant for.

    The draws come in rounds, each proposed from the weighted draws so far, and are weighted against the mixture of
    all proposals: twenty trials pin the noise far more narrowly than its prior, which draws from it alone would miss.
    """
    labels = np.asarray(seed)
    same_seed = (labels[:, None] == labels[None, :]).astype(float)
    offset = float(np.mean(np.asarray(y)))
    centred = np.asarray(y, dtype=float) - offset
    medians, sds = prior.log_medians_and_sds()
    normals = _standard_normals()
    proposals = [(np.zeros(5), np.eye(5))]
    z, log_target = np.empty((0, 5)), np.empty(0)
    for round_index in range(_ROUNDS):
        centre, factor = proposals[-1]
        new = centre + normals[round_index] @ factor.T
        z = np.concatenate([z, new])
        likelihood = _log_likelihood(x, same_seed, centred, medians + sds * new, prior.level)
        log_target = np.concatenate([log_target, likelihood - 0.5 * np.square(new).sum(axis=1)])
        log_weights = log_target - _log_mixture_density(z, proposals)
        proposals.append(_proposal(z, log_weights))
    weights = _normalised(log_weights)
    kept = weights > _NEGLIGIBLE * weights.max()
    theta, weights = medians + sds * z[kept], weights[kept] / weights[kept].sum()
    whitening = np.linalg.inv(np.linalg.cholesky(_covariance(x, same_seed, theta, prior.level)))
    alpha = np.einsum("dij,di->dj", whitening, whitening @ centred)
    return Posterior(np.asarray(x), theta, weights, prior.level, whitening, alpha, offset)


def _matern(a: Array, b: Array, theta: Array) -> Array:
    """`[D, m, n]` signal covariance between points `[m, 2]` and `[n, 2]` under `[D, 5]` hyper-parameters."""
    gaps = np.square(a[:, None, :] - b[None, :, :])
    scales = np.exp(-2 * theta[:, :2])
    distance = np.sqrt(5 * np.tensordot(scales, gaps, axes=(1, 2)))
    signal = np.exp(2 * theta[:, 2])[:, None, None]
    return signal * (1 + distance + np.square(distance) / 3) * np.exp(-distance)


def _covariance(x: Array, same_seed: Array, theta: Array, level: float) -> Array:
    """`[D, n, n]` covariances of y under `[D, 5]` hyper-parameters."""
    seed_variance, noise_variance = np.exp(2 * theta[:, 3:5]).T[:, :, None, None]
    jitter = _JITTER * (np.exp(2 * theta[:, 2])[:, None, None] + level**2)
    covariance = _matern(x, x, theta) + level**2 + seed_variance * same_seed
    return covariance + (noise_variance + jitter) * np.eye(len(x))


def _log_likelihood(x: Array, same_seed: Array, y: Array, theta: Array, level: float) -> Array:
    """`[D]` log marginal likelihoods up to a constant; in blocks, so that memory stays bounded for many trials."""
    block = max(1, _BLOCK_ELEMENTS // len(x) ** 2)
    parts = []
    for start in range(0, len(theta), block):
        covariance = _covariance(x, same_seed, theta[start : start + block], level)
        factor = np.linalg.cholesky(covariance)
        log_determinant = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        explained = np.linalg.solve(covariance, np.broadcast_to(y[:, None], (len(covariance), len(y), 1)))[:, :, 0]
        parts.append(-0.5 * explained @ y - log_determinant)
    return np.concatenate(parts)


@cache
def _standard_normals() -> Array:
    """`[rounds, draws, 5]` scrambled Sobol points as standard normals: a constant of the model."""
    points = qmc.Sobol(5, scramble=True, seed=20).random(_ROUNDS * _DRAWS)
    return ndtri(np.clip(points, 1e-6, 1 - 1e-6)).reshape(_ROUNDS, _DRAWS, 5)


def _log_mixture_density(z: Array, proposals: list[tuple[Array, Array]]) -> Array:
    """`[D]` log density, up to a constant, of the equal mixture of normal proposals (centre, Cholesky factor)."""
    parts = []
    for centre, factor in proposals:
        standard = np.linalg.solve(factor, (z - centre).T)
        parts.append(-0.5 * np.square(standard).sum(axis=0) - np.log(np.diag(factor)).sum())
    return np.logaddexp.reduce(parts, axis=0)


def _proposal(z: Array, log_weights: Array) -> tuple[Array, Array]:
    """Centre and (inflated) Cholesky factor of the weighted draws, tempered until enough of them count."""
    temper = 1.0
    weights = _normalised(log_weights)
    while 1 / np.square(weights).sum() < _MIN_EFFECTIVE and temper > 1e-3:
        temper *= 0.7
        weights = _normalised(temper * log_weights)
    centre = weights @ z
    covariance = (z - centre).T @ (weights[:, None] * (z - centre))
    return centre, np.asarray(np.linalg.cholesky(_INFLATION * covariance + 0.02 * np.eye(5)), dtype=np.float64)


def _normalised(log_weights: Array) -> Array:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), 0.5)])
