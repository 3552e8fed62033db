"""The first baseline goes ahead: the other trials train once it has rerouted; without that they would be in vain.

They start beside it and import their libraries meanwhile, so that hardly any time is lost.
"""

import csv
import time
from pathlib import Path

from analysis.constraint import baseline_rerouted
from sweeps.plan.early_stopping import held_out_curve

FIRST = "t000"
"""The plan's first trial."""
POLL_S = 0.1
NOT_BEGUN = f"not begun: the first baseline ({FIRST}) did not reroute"


def wait_for_first_baseline(run_dir: Path, trial_id: str) -> str:
    """Return when the first baseline has rerouted by a held-out evaluation, or has ended.

    Returns:
        Why the trial shall not begin; empty where it shall.
    """
    while trial_id != FIRST:
        ended = _status(run_dir / "trials.csv") not in ("running", None)
        curve = held_out_curve(run_dir / "trials" / FIRST)
        if any(baseline_rerouted([loss]) for loss in curve.values()):
            return ""
        if ended:
            completed = _status(run_dir / "trials.csv") == "completed"
            return NOT_BEGUN if completed else ""  # of one that failed nothing is known
        time.sleep(POLL_S)
    return ""


def _status(trials: Path) -> str | None:
    """The first baseline's status in trials.csv; None while it has no row."""
    if not trials.is_file():
        return None
    with trials.open(newline="", encoding="utf-8") as file:
        return next((row["status"] for row in csv.DictReader(file) if row["trial_id"] == FIRST), None)
