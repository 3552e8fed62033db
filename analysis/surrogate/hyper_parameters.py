"""Hyper-parameters of the Gaussian process: draws of them, weighted by prior × marginal likelihood."""

from functools import cache

import numpy as np
from scipy.special import ndtri
from scipy.stats import qmc

from analysis.surrogate.failures import Failures, explained
from analysis.surrogate.kernel import Array, Prior, Seeds, observed_covariance

_DRAWS = 64
"""A round; a power of 2, for which Sobol points are balanced."""
_ROUNDS = 8
_MIN_EFFECTIVE = 12.0
"""Effective number of draws, 1 / Σ weight², from which mean and covariance of a proposal are taken."""
_INFLATION = 1.3
"""Of a proposal's covariance: importance weights are bounded only where a proposal is wider than the target."""
_NEGLIGIBLE = 1e-4
"""Weight, as a share of the largest, up to which a draw is dropped."""


def hyper_parameters(
    x: Array, seed: Seeds, y: Array, prior: Prior, failures: Failures, draws: int | None
) -> tuple[Array, Array]:
    """`[D, 5]` draws and their `[D]` weights, which sum to 1; arguments as `gaussian_process.fit` has them, y centred.

    Adaptive multiple importance sampling (Cornuet et al. 2012) of p(theta | y) ∝ p(theta) · p(y | theta):

        q₁ = prior
        for r = 1 … rounds:
            draw z from q_r                                     64 new ones, kept with all earlier ones
            weight of each z = p(z) p(y | z) / Σ_{s ≤ r} q_s(z)
            q_{r+1} = a normal that fits the weighted draws

    z = (theta − log of the prior median) / prior sd: in it the prior is a standard normal whatever the metric.
    """
    medians, sds = prior.log_medians_and_sds()
    normals = _standard_normals()
    proposals = [(np.zeros(5), np.eye(5))]  # centre and Cholesky factor; the first is the prior
    z, log_target = np.empty((0, 5)), np.empty(0)
    for round_index in range(_ROUNDS):
        # Draw from the newest proposal.
        centre, factor = proposals[-1]
        new = centre + normals[round_index] @ factor.T
        z = np.concatenate([z, new])
        # log p(y | z) + log p(z); constants are left out here and in the densities, since weights are normalised.
        likelihood, _ = explained(observed_covariance(x, seed, medians + sds * new, prior.level), y, failures)
        log_target = np.concatenate([log_target, likelihood - 0.5 * np.square(new).sum(axis=1)])
        # Old draws are weighted anew, against all proposals together. Against its own proposal alone, one draw from
        # the tail of a proposal that missed the target would outweigh all others.
        log_weights = log_target - _log_mixture_density(z, proposals)
        proposals.append(_proposal(z, log_weights))
    weights = _normalised(log_weights)
    # A draw costs an n × n factor, and its share of every prediction: those of no weight go.
    kept = np.flatnonzero(weights > _NEGLIGIBLE * weights.max())
    if draws is not None:
        # Systematic resampling: cut the total weight into `draws` equal parts and take the draw at the middle of each.
        # One that is met k times is kept once with weight k. Nothing is random.
        kept = np.searchsorted(np.cumsum(weights)[:-1], (np.arange(draws) + 0.5) / draws)
        kept, times = np.unique(kept, return_counts=True)
        weights[kept] = times
    return medians + sds * z[kept], weights[kept] / weights[kept].sum()


@cache
def _standard_normals() -> Array:
    """`[rounds, draws, 5]` scrambled Sobol points as standard normals: a constant of the model."""
    points = qmc.Sobol(5, scramble=True, seed=20).random(_ROUNDS * _DRAWS)
    # At 0 and 1 the normal quantile is infinite.
    normal: Array = ndtri(np.clip(points, 1e-6, 1 - 1e-6)).reshape(_ROUNDS, _DRAWS, 5)
    return normal


def _log_mixture_density(z: Array, proposals: list[tuple[Array, Array]]) -> Array:
    """`[D]` log density, up to a constant, of the equal mixture of normal proposals (centre, Cholesky factor)."""
    parts = []
    for centre, factor in proposals:
        standard = np.linalg.solve(factor, (z - centre).T)
        parts.append(-0.5 * np.square(standard).sum(axis=0) - np.log(np.diag(factor)).sum())
    density: Array = np.logaddexp.reduce(parts, axis=0)
    return density


def _proposal(z: Array, log_weights: Array) -> tuple[Array, Array]:
    """Centre and (inflated) Cholesky factor of the weighted draws, tempered until enough of them count.

    In the first rounds few draws meet the likelihood's peak and hold nearly all the weight; a normal that fits those
    few is hardly wider than a point. So all weights are raised to a power below 1, by steps, until 12 draws count.
    """
    temper = 1.0
    weights = _normalised(log_weights)
    while 1 / np.square(weights).sum() < _MIN_EFFECTIVE and temper > 1e-3:
        temper *= 0.7
        weights = _normalised(temper * log_weights)
    centre = weights @ z
    covariance = (z - centre).T @ (weights[:, None] * (z - centre))
    # The second term, 0.14 prior standard deviations squared, keeps some width in every direction.
    return centre, np.asarray(np.linalg.cholesky(_INFLATION * covariance + 0.02 * np.eye(5)), dtype=np.float64)


def _normalised(log_weights: Array) -> Array:
    """Weights that sum to 1; the largest is taken off first, since exp of a log likelihood may overflow or vanish."""
    weights = np.exp(log_weights - log_weights.max())
    normalised: Array = weights / weights.sum()
    return normalised
