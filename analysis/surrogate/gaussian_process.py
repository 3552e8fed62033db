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
from functools import cache

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import qmc

from analysis.surrogate.kernel import JITTER, Array, Prior, Seeds, covariance, observed_covariance, variance

_DRAWS = 64
"""A round; a power of 2, for which Sobol points are balanced."""
_ROUNDS = 8
_MIN_EFFECTIVE = 12.0
"""Effective number of draws, 1 / Σ weight², from which mean and covariance of a proposal are taken."""
_INFLATION = 1.3
"""Of a proposal's covariance: importance weights are bounded only where a proposal is wider than the target."""
_NEGLIGIBLE = 1e-4
"""Weight, as a share of the largest, up to which a draw is dropped."""
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
    whitening: Array
    """`[D, n, n]` inverse Cholesky factors of the covariance of y."""
    alpha: Array
    """`[D, n]` covariance⁻¹ (y − offset)."""
    offset: float

    def value(self, points: Array) -> Mixture:
        """level + f at `points` `[m, 2]`: what a run would give on average over seeds."""
        cross = covariance(points, self.x, self.theta) + self.level**2
        prior_variance = variance(points, self.theta) + self.level**2
        return self._condition(cross, prior_variance, self.offset)

    def difference(self, points: Array, reference: Array) -> Mixture:
        """f at `points` `[m, 2]` minus f at `reference` `[2]`, jointly: level and what both share cancel."""
        return self._difference(points, reference, covariance(points, self.x, self.theta))[0]

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
        whitening = _whitening(x, labels, self.theta, self.level)
        # An observation that equals its prediction moves no mean: K⁻¹ (y − offset) stays, with 0 in its place.
        alpha = np.pad(self.alpha, ((0, 0), (0, len(labels) - self.alpha.shape[1])))
        return replace(self, x=x, seed=labels, whitening=whitening, alpha=alpha)

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


def fit(x: Array, seed: ArrayLike, y: ArrayLike, prior: Prior, draws: int | None = None) -> Posterior:
    """Average the model over its hyper-parameters, given n ≥ 1 observations.

    Args:
        x: `[n, 2]` from `coordinates`.
        seed: `[n]` labels; trials with one label share an error.
        y: `[n]` finite values of one metric, on the scale that `prior` is meant for.
        draws: hyper-parameter draws to keep at most, resampled by weight; None keeps all that carry weight.

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
    theta, weights = _hyper_parameters(x[some], labels[some], centred[some], prior, draws)
    whitening = _whitening(x, labels, theta, prior.level)
    alpha = np.einsum("dij,di->dj", whitening, whitening @ centred)  # L⁻ᵀ (L⁻¹ y) = K⁻¹ y
    return Posterior(x, labels, theta, weights, prior.level, whitening, alpha, offset)


def _hyper_parameters(x: Array, seed: Seeds, y: Array, prior: Prior, draws: int | None) -> tuple[Array, Array]:
    """`[D, 5]` draws and their `[D]` weights, which sum to 1.

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
        likelihood = _log_likelihood(x, seed, y, medians + sds * new, prior.level)
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


def _whitening(x: Array, seed: Seeds, theta: Array, level: float) -> Array:
    """`[D, n, n]` inverse Cholesky factors L⁻¹ of the covariances of y, for many points at a time."""
    factors = np.linalg.cholesky(observed_covariance(x, seed, theta, level))
    return np.asarray(np.linalg.inv(factors), dtype=np.float64)


def _log_likelihood(x: Array, seed: Seeds, y: Array, theta: Array, level: float) -> Array:
    """`[D]` log marginal likelihoods up to a constant: −½ yᵀ K⁻¹ y − ½ log det K; ½ log det K = Σ log L_ii."""
    observed = observed_covariance(x, seed, theta, level)
    factor = np.linalg.cholesky(observed)
    log_determinant = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
    explained = np.linalg.solve(observed, np.broadcast_to(y[:, None], (len(theta), len(y), 1)))[:, :, 0]
    log_likelihood: Array = -0.5 * explained @ y - log_determinant
    return log_likelihood


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


def _weighted_median(values: Array, weights: Array) -> float:
    order = np.argsort(values)
    return float(values[order][np.searchsorted(np.cumsum(weights[order]), 0.5)])
