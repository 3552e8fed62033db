"""The reroute constraint, written once: for the plan, for stopping and for the decision.

Rerouting achieved is 1 − `eval_loss_reroute` (every run starts at a loss of 1). A trial satisfies the
constraint when it loses at most a given fraction of the rerouting that the `beta_kl = 0` baseline achieved.
"""

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

REROUTE_TOLERANCE = 0.05
"""Fraction of the baseline's rerouting that may be lost, where nothing else is asked for."""
CONFIDENCE = 0.95
"""Probability of keeping that limit which a recommendation needs, where nothing else is asked for."""
MIN_BASELINE_ACHIEVED = 0.2
"""Below this mean rerouting achieved the baseline never rerouted, and every comparison with it is vacuous."""
FAILED = 0.25
"""A seed failed where it lost more than this share of the rerouting that the best seed of the same setting achieved."""


def failed_seeds(losses: Sequence[float]) -> tuple[bool, ...]:
    """Which seeds of one setting, by their `eval_loss_reroute`, never rerouted although others did.

    They are no noise: a layer collapses or does not. Where none rerouted none of them failed: there is no other.
    """
    best = 1 - min(losses)
    return tuple(best >= MIN_BASELINE_ACHIEVED and 1 - loss < (1 - FAILED) * best for loss in losses)


def fails_often(failed: int, seeds: int) -> bool:
    """Whether so many seeds failed that failing is the setting's nature, and no accident: at least 2, and half."""
    return failed >= 2 and 2 * failed >= seeds


def baseline_rerouted(baseline_losses: Iterable[float]) -> bool:
    """Whether the mean rerouting achieved by the baselines that count reaches `MIN_BASELINE_ACHIEVED`."""
    return _achieved(baseline_losses) >= MIN_BASELINE_ACHIEVED


def absolute_tolerance(baseline_losses: Iterable[float], reroute_tolerance: float) -> float:
    """The allowed rise of `eval_loss_reroute`: `reroute_tolerance` × the mean achieved by the baselines that count."""
    return reroute_tolerance * _achieved(baseline_losses)


def sound_losses(losses: Iterable[float]) -> list[float]:
    """Those of one setting whose seed did not fail, of at least one."""
    losses = [*losses]
    return [loss for loss, failed in zip(losses, failed_seeds(losses), strict=True) if not failed]


def _achieved(losses: Iterable[float]) -> float:
    return 1 - fmean(sound_losses(losses))


def reroute_regression(loss: float, seed: int, baseline: Mapping[int, float], tolerance: float) -> float:
    """How far a trial is over (> 0) or within (≤ 0) the limit, in units of `eval_loss_reroute`.

    Args:
        loss: the trial's `eval_loss_reroute`.
        seed: the trial's seed; compared with the baseline of the same seed where there is one,
            otherwise with the baselines' mean.
        baseline: `eval_loss_reroute` of the completed `beta_kl = 0` trials by seed; not empty.
        tolerance: the value of `absolute_tolerance`.
    """
    paired = baseline.get(seed)
    return loss - (fmean(baseline.values()) if paired is None else paired) - tolerance


def observed_feasible(regression: float) -> bool:
    """Whether one trial, as it was measured, is within the limit; of a trial at the limit chance decides which.

    The plan writes this into the column `feasible`. The decision never reads it.

    Args:
        regression: of `reroute_regression`.
    """
    return regression <= 0


def probably_feasible(probability: float, confidence: float) -> bool:
    """Whether a setting is within the limit as surely as a recommendation needs.

    Args:
        probability: that the setting's mean over seeds is within the limit, by the model of all trials.
        confidence: probability that is asked for.
    """
    return probability >= confidence
