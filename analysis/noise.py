"""How noisy a sweep is, for its reader: the spread between seeds against the limit that it has to resolve."""

import math
from collections.abc import Sequence
from statistics import stdev

from analysis.constraint import sound_losses

NOISY = 1 / 2.5
"""Spread between seeds, in units of the limit, beyond which twenty trials are unlikely to hold an answer."""
MIN_SEEDS = 3
"""Baseline seeds from which their spread says something."""
_TWO_ERRORS = 12.4
"""2 (z_0.95 + z_0.80)²: one-sided 5 % error, 80 % power, the variance of a difference of two means."""


def is_noisy(sigma: float, tolerance: float) -> bool:
    """Whether σ between seeds is too much for the limit; both in units of `eval_loss_reroute`."""
    return sigma > NOISY * tolerance


def excessive_spread(baseline_losses: Sequence[float], tolerance: float) -> float | None:
    """σ between the baseline's seeds that did not fail, where it is too much for the limit; None where it is not, or
    they are too few."""
    losses = sound_losses(baseline_losses) if baseline_losses else []
    if len(losses) < MIN_SEEDS:
        return None
    sigma = stdev(losses)
    return sigma if is_noisy(sigma, tolerance) else None


def seeds_needed(sigma: float, tolerance: float, correlation: float = 0.0) -> int:
    """Seeds a setting, baseline included, that tell a loss of the limit from none: 12.4 · (1 − ρ) · (σ / limit)².

    Args:
        sigma: standard deviation between seeds.
        tolerance: the allowed rise; both in units of `eval_loss_reroute`.
        correlation: ρ between baseline and trial of one seed; 0 where it is not known gives the most.
    """
    return max(MIN_SEEDS, math.ceil(_TWO_ERRORS * (1 - correlation) * (sigma / tolerance) ** 2))


def baseline_seeds_of(num_samples: int) -> int:
    """Seeds of the baseline in a sweep of so many trials that is not told otherwise: a fifth, at least 3, at most 8."""
    return min(8, max(MIN_SEEDS, num_samples // 5))


def samples_for(seeds: int) -> int:
    """Trials of a sweep that has room for as many seeds of the baseline and of one setting, in tens."""
    return 10 * math.ceil((2 * seeds + 14) / 10)
