"""Two widespread readings of a sweep that mislead, each beside what this sweep shows instead."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.formatting import number


@dataclass(frozen=True)
class Trap:
    """A reading that misleads, and why."""

    title: str
    text: str


def traps(trials: pd.DataFrame, curves: pd.DataFrame) -> list[Trap]:
    """Both, with the numbers of this sweep."""
    return [
        Trap(
            "“A larger beta_kl logs a larger loss_kl.”",
            "As a rule it logs a smaller one: loss_kl is logged without its weight, and more weight presses it down. "
            f"{_loss_kl_falls(trials)}",
        ),
        Trap(
            "“A short, gentle run left reroute unchanged, so KL does no harm.”",
            "Nothing had moved yet. At LoRA's start all gradients vanish: the rerouting loss stays flat, then "
            f"collapses; a run that ends before (such as 50 steps at a low lr) compares nothing. "
            f"{_when_collapsed(trials, curves)}",
        ),
    ]


def _loss_kl_falls(trials: pd.DataFrame) -> str:
    rows = trials[(trials["status"] == "completed") & (trials["beta_kl"] > 0) & (trials["kl_temperature"] == 1.0)]
    rows = rows[np.isfinite(rows["loss_kl"].astype(float))]
    if rows["beta_kl"].nunique() < 2:
        return "This sweep has too few trials at T 1 to show it."
    by_beta = rows.groupby("beta_kl")["loss_kl"].mean()
    low, high = by_beta.index[0], by_beta.index[-1]
    exception = "" if by_beta[high] < by_beta[low] else "an exception: "
    return (
        f"Here, at T 1, {exception}{number(by_beta[low])} at beta_kl {number(low)}, "
        f"{number(by_beta[high])} at {number(high)}. Values at different temperatures cannot be compared at all."
    )


def _when_collapsed(trials: pd.DataFrame, curves: pd.DataFrame) -> str:
    baselines = set(trials.loc[(trials["beta_kl"] == 0) & (trials["status"] == "completed"), "trial_id"])
    if "loss_reroute" not in curves or not baselines:
        return ""
    rows = curves[curves["trial_id"].isin(baselines) & (curves["loss_reroute"].astype(float) < 0.5)]
    if rows.empty:
        return "Here the baseline's training loss never fell below 0.5."
    last = int(rows.groupby("trial_id")["step"].min().max())
    return f"Here every baseline that collapsed had fallen below 0.5 by step {last} of {int(curves['step'].max())}."
