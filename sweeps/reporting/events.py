"""A line for each trial event, where no table can stay in place."""

import time
from collections.abc import Sequence

from sweeps.plan.plan import SweepPlan
from sweeps.reporting.progress import Row
from sweeps.reporting.screen import SCREEN, WIDTH

HEADER = " time      phase    beta_kl    T seed"


class EventLines:
    """Prints a line when a trial starts and when it ends, told by comparing the plan with what was printed.

    Args:
        before: rows that are not news.
    """

    def __init__(self, plan: SweepPlan, before: Sequence[Row] = ()) -> None:
        self._plan = plan
        self._printed = {str(row["trial_id"]): str(row["status"]) for row in before}
        self._started = time.monotonic()
        SCREEN.say(HEADER)

    def update(self, rows: Sequence[Row]) -> None:
        """Print what is new in the plan's rows."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        for row in rows:
            trial_id, status = str(row["trial_id"]), str(row["status"])
            if self._printed.get(trial_id) != status:
                self._printed[trial_id] = status
                line = f"{minutes:2d}:{seconds:02d} {_event(row, self._plan.tolerance)}".rstrip()
                if len(line) > WIDTH:
                    line = f"{line[: WIDTH - 18]}… (logs/{trial_id}.log)"
                SCREEN.say(line)


def _event(row: Row, tolerance: float | None) -> str:
    beta_kl, temperature = (
        ("0", "–") if row["beta_kl"] == 0 else (f"{row['beta_kl']:.3g}", f"{row['kl_temperature']:.3g}")
    )
    setting = f"{row['trial_id']} {row['phase']:<8} {beta_kl:>7} {temperature:>4} {row['seed']:>4}"
    return f"{setting}  {_result(row, tolerance)}"


def _result(row: Row, tolerance: float | None) -> str:
    if row["status"] == "running":
        return "started"
    if row["status"] == "stopped" and row["steps"] is not None:
        return f"stopped: step {row['steps']}, reroute {row['eval_loss_reroute']:.4f}"
    if row["status"] != "completed":
        return f"{row['status']}: {row['error']}"
    text = f"reroute {row['eval_loss_reroute']:.4f} drift {row['eval_benign_kl']:<7.3g}"
    if row["phase"] == "baseline" or tolerance is None:
        return text
    lost = row["reroute_regression"] + tolerance
    return f"{text} {lost:+.3f} {'ok' if row['feasible'] else 'over'}"
