"""The columns of `trials.csv`, a row a trial, in their order: what the sweep writes is what the analysis reads."""

from typing import Literal, get_args

Status = Literal["completed", "stopped", "failed"]
"""How a trial ended."""
STATUSES = ("running", *get_args(Status))

SETTING_COLUMNS = ("trial_id", "phase", "status", "beta_kl", "kl_temperature", "seed")
METRIC_COLUMNS = (
    *("steps", "loss_reroute", "loss_retain", "loss_kl"),
    *("eval_loss_reroute", "eval_loss_retain", "eval_benign_kl", "eval_benign_nll", "eval_harmful_nll"),
    *("base_benign_nll", "base_harmful_nll", "train_s", "wall_s"),
)
"""What a trial itself reports; others that it reports follow these, by name."""
JUDGED_COLUMNS = ("reroute_regression", "feasible", "error")
PLAN_COLUMNS = (*SETTING_COLUMNS, *JUDGED_COLUMNS)
"""What the plan fills, whatever a trial reports under these names."""
COLUMNS = (*SETTING_COLUMNS, *METRIC_COLUMNS, *JUDGED_COLUMNS)

TEXT_COLUMNS = ("trial_id", "phase", "status", "feasible", "error")
NUMBER_COLUMNS = tuple(name for name in COLUMNS if name not in TEXT_COLUMNS)

_ROUNDING = 1e-4
"""A cosine in half precision leaves its range, and a divergence falls below 0, by no more."""


def impossible_value(metric: str, value: float) -> str:
    """What a metric's value must be where it is one that no training can give; empty for all others, NaN included."""
    if metric == "eval_benign_kl" and value < -_ROUNDING:
        return "a divergence must be 0 or more"
    if metric in ("eval_loss_reroute", "loss_reroute") and not (-_ROUNDING <= value <= 1 + _ROUNDING or value != value):
        return "must lie between 0 and 1"
    return ""
