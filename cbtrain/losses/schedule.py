"""Loss coefficients and learning rate as functions of the step: reroute first, retain later.

With p = step / (m · steps), cs falls from alpha and cr rises towards it. Algorithm 1 of Zou et al. 2024 prints
the two the other way round; the paper's appendix, its code and working replications use this order.
"""

import math
from dataclasses import dataclass

from cbtrain.config import CircuitBreakerConfig


@dataclass(frozen=True)
class Coefficients:
    """What multiplies the losses in one step: cs · reroute + cr · retain + kl_weight · kl."""

    cs: float
    cr: float
    kl_weight: float
    """cr · beta_kl, with the ramp where there is one."""


def coefficients(config: CircuitBreakerConfig, step: int) -> Coefficients:
    """Coefficients of the update after `step` updates are done (0 for the first)."""
    progress = min(1.0, step / (config.schedule_horizon * config.steps))
    if config.coefficient_schedule == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    cs, cr = config.alpha * (1 - progress), config.alpha * progress
    beta = config.beta_kl * (progress if config.beta_kl_schedule == "ramp" else 1.0)
    return Coefficients(cs=cs, cr=cr, kl_weight=cr * beta)


def learning_rate(config: CircuitBreakerConfig, step: int) -> float:
    """AdamW's rate for the update after `step` updates: linear warm-up, then constant or linear decay to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    return config.lr * (config.steps - step) / max(1, config.steps - config.warmup_steps)
