"""The losses that train a circuit breaker, and their schedule."""

from cbtrain.losses.fused_kl import fused_linear_kl
from cbtrain.losses.losses import kl_divergence_loss, nll, relative_retain_loss, reroute_loss, retain_loss

__all__ = ["fused_linear_kl", "kl_divergence_loss", "nll", "relative_retain_loss", "reroute_loss", "retain_loss"]
