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
