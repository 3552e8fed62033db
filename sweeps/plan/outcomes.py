"""What a trial came to: outcomes checked when they are told, and as rows of trials.csv."""

import math
import numbers
from dataclasses import replace
from typing import Any

from analysis.columns import impossible_value
from analysis.constraint import observed_feasible, reroute_regression
from sweeps.plan.journal import Entry, TrialOutcome

REQUIRED_METRICS = ("eval_benign_kl", "eval_loss_reroute", "eval_harmful_nll")


def checked(outcome: TrialOutcome) -> TrialOutcome:
    """The outcome in plain Python numbers; a completed one that lacks a finite metric becomes failed."""
    plain = {name: _plain(getattr(outcome, name)) for name in REQUIRED_METRICS}
    outcome = replace(outcome, **plain, metrics={name: _plain(value) for name, value in outcome.metrics.items()})
    if outcome.status != "completed":
        return outcome
    for name, value in (plain | outcome.metrics).items():
        if value is None:
            return replace(outcome, status="failed", error=f"{name} is missing")
        if isinstance(value, float) and not math.isfinite(value):
            return replace(outcome, status="failed", error=f"{name} is {value}, not a finite number")
        if isinstance(value, float) and (impossible := impossible_value(name, value)):
            return replace(outcome, status="failed", error=f"{name} is {value}: {impossible}")
    return outcome


def _plain(value: Any) -> Any:
    """NumPy and other scalars as the Python numbers that JSON knows."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else value


def metrics_of(entry: Entry) -> dict[str, object]:
    if entry.outcome is None:
        return {}
    return {**entry.outcome.metrics, **{name: getattr(entry.outcome, name) for name in REQUIRED_METRICS}}


def completed_loss(entry: Entry) -> float | None:
    outcome = entry.outcome
    return outcome.eval_loss_reroute if outcome is not None and outcome.status == "completed" else None


def regression_of(entry: Entry, baseline: dict[int, float], tolerance: float | None) -> float | None:
    """`reroute_regression` of a completed trial; None for others and while the tolerance is not known."""
    loss = completed_loss(entry)
    if loss is None or tolerance is None:
        return None
    return reroute_regression(loss, entry.spec.seed, baseline, tolerance)


def row_of(
    entry: Entry, names: tuple[str, ...], baseline: dict[int, float], tolerance: float | None
) -> dict[str, object]:
    spec, outcome, metrics = entry.spec, entry.outcome, metrics_of(entry)
    regression = regression_of(entry, baseline, tolerance)
    return {
        "trial_id": spec.trial_id,
        "phase": spec.phase,
        "status": "running" if outcome is None else outcome.status,
        "beta_kl": spec.beta_kl,
        "kl_temperature": spec.kl_temperature,
        "seed": spec.seed,
        **{name: metrics.get(name) for name in names},
        "reroute_regression": regression,
        "feasible": None if regression is None else observed_feasible(regression),
        "error": "" if outcome is None else outcome.error,
    }
