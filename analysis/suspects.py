"""Trials that most likely failed: named, with what their setting and its neighbours say and what the trial shows."""

import math

import pandas as pd

from analysis.baseline import trial_state
from analysis.decision import Suspect
from analysis.formatting import number, signed
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.surrogate import SUSPECT, Surrogate


def suspects(model: Surrogate, achieved: float, reference: float) -> tuple[Suspect, ...]:
    """The trials of the model that most likely failed, in their order.

    Args:
        achieved: by the baselines that did not fail, 1 − `eval_loss_reroute`.
        reference: their mean `eval_loss_reroute`.
    """
    rows = model.trials[model.suspect]
    if rows.empty:
        return ()
    points = coordinates(rows["beta_kl"], rows["kl_temperature"], model.space)
    reroute = reference + achieved * model.lost(points).expectation()
    log_drift = model.drift.value(points).expectation()
    return tuple(_suspect(row, float(reroute[i]), math.exp(log_drift[i])) for i, (_, row) in enumerate(rows.iterrows()))


def _suspect(row: pd.Series, reroute: float, drift: float) -> Suspect:
    by_reroute = row["reroute_failed"] > SUSPECT
    by_drift = row["drift_failed"] > SUSPECT and row["beta_kl"] > 0
    says = "its setting's other seeds and its neighbours say"
    found = []
    if by_reroute:
        found.append(f"reroute {signed(row['eval_loss_reroute'] - reroute)} from what {says} ({number(reroute)})")
    elif by_drift:
        found.append(
            f"benign drift {number(row['eval_benign_kl'])} where {says.removesuffix(' say')} say {number(drift)}"
        )
    name = str(row.get("trial_id", ""))
    state = trial_state(row) if by_reroute else ""
    evidence = "; ".join(filter(None, [*found, state, f"logs/{name}.log"]))
    return Suspect(
        trial_id=name,
        beta_kl=float(row["beta_kl"]),
        kl_temperature=float(row["kl_temperature"]),
        seed=int(row["seed"]),
        metrics=tuple(
            metric for metric, failed in (("eval_loss_reroute", by_reroute), ("eval_benign_kl", by_drift)) if failed
        ),
        probability=float(max(row["reroute_failed"], row["drift_failed"])),
        evidence=evidence,
    )
