"""Runs that failed: a second kind of outcome beside a normal error, in the likelihood of the Gaussian process.

Training runs are not Gaussian. At one seed of twenty a layer never collapses, or a run comes apart; its result lies
anywhere and says nothing of its setting. A normal likelihood takes that for noise, and is then unsure of everything.
Here each observation has failed with a small prior probability, and then lies uniformly in a wide range:

    p(y | theta, z) = N(y of those that did not fail; 0, K) · Π over failed z: (rate · density) · Π others: (1 − rate)

which would have to be summed over all 2ⁿ sets z. Taken is, under each draw theta, the one set that is built by naming
the most surprising observation failed as long as that makes the whole likelier. A surprise is measured against all
other observations: i fails where rate · density > (1 − rate) · p(yᵢ | all others), so two trials that agree are no
failure, and the draws of theta, each with its own set, share the doubt between noise and failure by their weights.
"""

import math
from dataclasses import dataclass

import numpy as np

from analysis.surrogate.kernel import JITTER, Array, Flags, inverse_factors

FAILURE_RATE = 0.05
"""Of runs, before anything is known of them."""
_MOST = 1 / 3
"""Share of the observations that may have failed: of more, failing is what the sweep does."""
_LOG_2PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class Failures:
    """What is believed of failures before the observations are seen."""

    probability: Array
    """`[n]` that each observation failed."""
    density: float
    """Of a failed observation's value, in 1 / units of y."""
    least: float = 0.0
    """Distance from what all others say, in units of y, up to which an observation has not failed, however little the
    others scatter: four baselines that agree to 0.003 make no failure of a fifth that is 0.008 off."""

    def of(self, some: Array) -> "Failures":
        """The same for some of the observations, by their places."""
        return Failures(self.probability[some], self.density, self.least)


def explained(observed: Array, y: Array, failures: Failures) -> tuple[Array, Flags]:
    """The likeliest set of failures under each draw.

    Args:
        observed: `[D, n, n]` covariances of the observations.
        y: `[n]`, centred.

    Returns:
        `[D]` log likelihoods with those failures, and which failed, `[D, n]`.
    """
    n, every = len(y), np.arange(len(observed))
    # By its factor, not by `inv(observed)`: two baselines with next to no noise make rows all but equal.
    whitening = inverse_factors(observed)
    half_log_determinant = -np.log(np.diagonal(whitening, axis1=1, axis2=2)).sum(axis=1)
    precision = whitening.transpose(0, 2, 1) @ whitening
    alpha = precision @ y
    lost_to_rounding = JITTER * np.diagonal(precision, axis1=1, axis2=2)
    log_likelihood = -0.5 * (alpha @ y + n * _LOG_2PI) - half_log_determinant
    log_likelihood += np.log1p(-failures.probability).sum()
    # log of rate · density / (1 − rate): what naming an observation failed costs in place of its own likelihood.
    cost = np.log(failures.probability) - np.log1p(-failures.probability) + math.log(failures.density)
    failed = np.zeros((len(observed), n), dtype=bool)
    for _ in range(int(n * _MOST)):
        # p(yᵢ | all others) of K⁻¹ (Sundararajan & Keerthi 2001): variance 1 / K⁻¹ᵢᵢ, residual αᵢ / K⁻¹ᵢᵢ.
        pivots = np.diagonal(precision, axis1=1, axis2=2)
        told = ~failed & (pivots > lost_to_rounding)
        pivots = np.where(told, pivots, 1.0)
        left_out = -0.5 * (np.square(alpha) / pivots - np.log(pivots) + _LOG_2PI)
        far = np.abs(alpha) > failures.least * pivots
        gain = np.where(told & far, cost - left_out, -np.inf)
        worst = gain.argmax(axis=1)
        better = np.flatnonzero(gain[every, worst] > 0)
        if not len(better):
            break
        place = worst[better]
        log_likelihood[better] += gain[better, place]
        failed[better, place] = True
        # Precision and α of the others alone: the Schur complement of the one that goes.
        column = precision[better, :, place]
        share = column / pivots[better, place][:, None]
        alpha[better] -= share * alpha[better, place][:, None]
        precision[better] -= share[:, :, None] * column[:, None, :]
    return log_likelihood, failed
