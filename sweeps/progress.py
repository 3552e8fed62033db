"""What a sweep prints: the plan before it starts, a line for each trial event, the summary at the end."""

import time
from collections.abc import Sequence
from typing import Any

from analysis.decision import Decision
from sweeps.budget import Budget
from sweeps.plan import SweepPlan

Row = dict[str, Any]


def plan_lines(budget: Budget, concurrency: int, reroute_tolerance: float) -> list[str]:
    """The plan, in the order in which it will run."""
    phases = ("baseline", "ablation", "search", "confirm")
    parts = " + ".join(f"{getattr(budget, phase)} {phase}" for phase in phases if getattr(budget, phase))
    lines = [f"plan      {budget.total} trials = {parts} · {concurrency} at a time"]
    if budget.dropped:
        lines.append(f"          left out for want of trials: {', '.join(budget.dropped)}")
    return [
        *lines,
        "search    beta_kl 0.001–2 (log) × kl_temperature 1–4 · minimise benign drift",
        f"subject   rerouting lost ≤ {reroute_tolerance:.0%} of what the baseline achieves",
    ]


class EventLines:
    """Prints a line when a trial starts and when it ends, told by comparing the plan with what was printed."""

    def __init__(self, plan: SweepPlan) -> None:
        self._plan = plan
        self._printed: dict[str, str] = {}
        self._started = time.monotonic()

    def update(self, rows: Sequence[Row]) -> None:
        """Print what is new in the plan's rows."""
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        for row in rows:
            trial_id, status = str(row["trial_id"]), str(row["status"])
            if self._printed.get(trial_id) != status:
                self._printed[trial_id] = status
                print(f"{minutes:3d}:{seconds:02d}  {_event(row, self._plan.tolerance)}", flush=True)


def _event(row: Row, tolerance: float | None) -> str:
    setting = "beta_kl 0    " if row["beta_kl"] == 0 else f"beta_kl {row['beta_kl']:<5.3g}"
    temperature = "T –   " if row["beta_kl"] == 0 else f"T {row['kl_temperature']:<4.3g}"
    return f"{row['trial_id']} {row['phase']:<8} {setting} {temperature} seed {row['seed']}  {_result(row, tolerance)}"


def _result(row: Row, tolerance: float | None) -> str:
    if row["status"] == "running":
        return "started"
    if row["status"] != "completed":
        return f"{row['status']}: {row['error']}"
    text = f"reroute {row['eval_loss_reroute']:.4f}  drift {row['eval_benign_kl']:.3g}"
    if row["phase"] == "baseline" or tolerance is None:
        return text
    lost = row["reroute_regression"] + tolerance
    return f"{text}  {lost:+.3f} {'ok' if row['feasible'] else 'over'}"


def summary_lines(rows: Sequence[Row], decision: Decision, wall_s: float, concurrency: int, run_dir: str) -> list[str]:
    """What the sweep did, what it cost and what to do next."""
    ended = [row for row in rows if row["status"] == "completed"]
    failed = sum(row["status"] == "failed" for row in rows)
    training = sum(row["train_s"] for row in ended)
    lines = [
        "",
        f"{len(rows)} trials in {wall_s:.0f} s · {len(ended)} done, {failed} failed",
        f"cost      training {training:.0f} s = {training / (wall_s * concurrency):.0%} of {wall_s:.0f} s × "
        f"{concurrency}{_overhead(ended)}",
    ]
    baseline = decision.baseline
    if baseline is not None:
        spread = "" if baseline.reroute_sd is None else f" ± {baseline.reroute_sd:.4f}"
        lines.append(
            f"baseline  reroute {baseline.eval_loss_reroute:.4f}{spread} over {baseline.n_seeds} seeds · "
            f"drift {baseline.drift:.3g} nats/token"
        )
    if decision.verdict == "choose":
        lines.append(
            f"best      beta_kl {decision.beta_kl:.3g}, T {decision.kl_temperature:.3g}: drift "
            f"{decision.eval_benign_kl:.3g} nats/token ({decision.drift_kept:.0%} of baseline), "
            f"P {decision.probability_feasible:.2f}"
        )
    else:
        lines.append(f"verdict   {decision.verdict}: {decision.reason}")
    return [
        *lines,
        f"next      python analysis/pick_beta.py {run_dir}",
        "          the decision, with its evidence",
        f"          optuna-dashboard {run_dir}/study.log",
        "          explore the trials",
    ]


def _overhead(ended: Sequence[Row]) -> str:
    """Mean seconds of a trial that went neither into training nor evaluation, first trials of a process left out."""
    seen: set[object] = set()
    later = []
    for row in sorted(ended, key=lambda row: row["ended_at"]):
        if row["process"] in seen:
            later.append(row["wall_s"] - row["train_s"] - row["eval_s"])
        seen.add(row["process"])
    if not later:
        return ""
    return f" · overhead {sum(later) / len(later):.2f} s a trial after the first in a process"
