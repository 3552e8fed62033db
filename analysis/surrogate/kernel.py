"""Covariance over (beta_kl, kl_temperature), its hyper-parameters and their priors.

`theta` `[D, 5]` holds, in each row, the natural logarithms of length_beta, length_temperature, signal, seed and noise;
the last three are standard deviations, so that exp(2 · theta) is a variance.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dtrtri

from analysis.surrogate.search_space import BETA_KL_RANGE, DEFAULT_SPACE, KL_TEMPERATURE_RANGE, SearchSpace

Array = NDArray[np.float64]
Seeds = NDArray[np.int64]
Flags = NDArray[np.bool_]

JITTER = 1e-10
"""Relative to a variance: what keeps it above 0."""

_BETA_KL_OFFSET = 1e-4
"""A tenth of the smallest weight of the default range: what sets the distance of that weight from the baseline."""
_BETA_KL_UNIT = math.log1p(BETA_KL_RANGE[1] / _BETA_KL_OFFSET)
"""Of the first coordinate, in the logarithm of beta_kl: the default range ends at 1."""
_TREND = 2.0
"""Standard deviation of the trend's slope, in units of the signal a unit of the first coordinate."""


@dataclass(frozen=True)
class Prior:
    """Log-normal priors of the hyper-parameters, each (median, standard deviation of the logarithm).

    Length scales are in units of `coordinates`, all else in units of y.
    """

    signal: tuple[float, float]
    seed: tuple[float, float]
    noise: tuple[float, float]
    level: float
    failed_density: float
    """Of the value of a run that failed: one over the range in which it may lie."""
    length_beta: tuple[float, float] = (0.4, 0.7)
    length_temperature: tuple[float, float] = (1.0, 0.7)

    def log_medians_and_sds(self) -> tuple[Array, Array]:
        """`[5]` each, in the order length_beta, length_temperature, signal, seed, noise."""
        pairs = (self.length_beta, self.length_temperature, self.signal, self.seed, self.noise)
        return np.log([median for median, _ in pairs]), np.array([sd for _, sd in pairs])


REROUTE_PRIOR = Prior(signal=(0.15, 1.0), seed=(0.005, 1.3), noise=(0.006, 1.3), level=1.0, failed_density=1 / 2)
"""For rerouting lost as a fraction of what the baseline achieved (noise from about 4e-4 to 0.1)."""
DRIFT_PRIOR = Prior(signal=(1.5, 0.6), seed=(0.1, 0.9), noise=(0.15, 0.8), level=5.0, failed_density=1 / 16)
"""For the logarithm of benign drift."""


def coordinates(beta_kl: ArrayLike, kl_temperature: ArrayLike, space: SearchSpace = DEFAULT_SPACE) -> Array:
    """`[n, 2]` model coordinates, about 0 to 1 over the default search space.

    The first is log(1 + beta_kl / 1e-4): 0 at the baseline, the logarithm over the search space, whose lower end
    stands a quarter of a unit off the baseline, so that KL which costs rerouting at any weight can be told.
    The second is temperature times the first: temperature acts through the KL alone, so that it is inert at
    `beta_kl = 0` and the less it matters the smaller the weight.

    Units are those of the default space whatever is searched, since the priors say how metrics answer to a change of
    weight or temperature, not to a share of a range. Two origins go with the space. Where it begins below 1e-3, a tenth
    of its smallest weight takes the place of 1e-4, which would draw such weights up to the baseline. And temperature
    counts from the lowest that is searched, so that a single one leaves a model of beta_kl alone.
    """
    beta = np.atleast_1d(np.asarray(beta_kl, dtype=float))
    offset = _BETA_KL_OFFSET * min(1.0, space.beta_kl[0] / BETA_KL_RANGE[0])
    weight = np.log1p(beta / offset) / _BETA_KL_UNIT
    above = np.asarray(kl_temperature, dtype=float) - space.kl_temperature[0]
    cold, hot = KL_TEMPERATURE_RANGE
    return np.stack([weight, weight * above / (hot - cold)], axis=1)


def covariance(a: Array, b: Array, theta: Array) -> Array:
    """`[D, m, n]` covariance of f between points `[m, 2]` and `[n, 2]` under `[D, 5]` hyper-parameters.

    Matérn 5/2, and a trend along the first coordinate, since what grows with beta_kl goes on growing beyond the data:

        signal² · ((1 + r + r² / 3) · exp(−r) + 2² · a₁ b₁),    r² = 5 · Σ_j ((a_j − b_j) / length_j)²

    The trend is a straight line through the baseline, where a₁ = 0, whose slope has a normal prior.
    """
    gaps = np.square(a[:, None, :] - b[None, :, :])
    scales = np.exp(-2 * theta[:, :2])
    distance = np.tensordot(5 * scales, gaps, axes=(1, 2))
    np.sqrt(distance, out=distance)
    # In place from here on: arrays of this size cost more to write than to compute.
    covariances: Array = distance / 3
    covariances += 1
    covariances *= distance
    covariances += 1
    np.negative(distance, out=distance)
    covariances *= np.exp(distance, out=distance)
    covariances += _TREND**2 * a[:, 0, None] * b[:, 0]
    covariances *= np.exp(2 * theta[:, 2])[:, None, None]
    return covariances


def variance(points: Array, theta: Array) -> Array:
    """`[D, m]`: the diagonal of `covariance(points, points, theta)`."""
    variances: Array = np.exp(2 * theta[:, 2:3]) * (1 + np.square(_TREND * points[:, 0]))
    return variances


def observed_covariance(x: Array, seed: Seeds, theta: Array, level: float) -> Array:
    """`[D, n, n]` covariances of observations: of f, the level, what a seed's observations share, and noise."""
    seed_variance, noise_variance = np.exp(2 * theta[:, 3:5]).T[:, :, None, None]
    same_seed = (seed[:, None] == seed[None, :]).astype(float)
    # Baselines stand at one point: where the noise is drawn small, their rows are all but equal.
    jitter = JITTER * (np.exp(2 * theta[:, 2])[:, None, None] + level**2)
    of_f = covariance(x, x, theta)
    of_f += level**2  # the level is one unknown that all observations share
    of_f += seed_variance * same_seed
    of_f += (noise_variance + jitter) * np.eye(len(x))
    return of_f


def inverse_factors(covariances: Array) -> Array:
    """`[D, n, n]` inverses L⁻¹ of the lower Cholesky factors of `[D, n, n]` covariances.

    Raises:
        numpy.linalg.LinAlgError: one of them is not positive definite.
    """
    factors = np.asarray(np.linalg.cholesky(covariances), dtype=np.float64)
    for number, factor in enumerate(factors):
        # LAPACK's own for triangular matrices: `np.linalg.inv` takes three times as long. It stores by columns, in
        # which a lower factor by rows is an upper one.
        factors[number] = dtrtri(factor.T)[0].T
    return factors
