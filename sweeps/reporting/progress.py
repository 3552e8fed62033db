"""How far a sweep is, as data: what the table on the screen and the line a minute show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from analysis.decision import Decision
from analysis.formatting import number, percent, temperature, with_relation
from sweeps.reporting.following import Latest
from sweeps.reporting.screen import WIDTH, clock

Row = dict[str, Any]
State = Literal["running", "baseline", "ok", "over", "stopped", "failed"]


@dataclass(frozen=True)
class TrialLine:
    """A trial in words, a field a column."""

    phase: str
    beta_kl: str
    temperature: str
    seed: str
    step: str
    reroute: str
    drift: str
    regression: str
    state: State


@dataclass(frozen=True)
class Progress:
    """Trials and steps of a sweep, `elapsed_s` after it began."""

    total: int
    done: int
    """Completed or stopped early."""
    failed: int
    running: int
    steps_run: int
    """Made by any trial, in any session."""
    steps_left: int
    """Of the trials that have not ended."""
    elapsed_s: float
    left_s: float | None
    """None before a step was made."""

    @property
    def left(self) -> int:
        """Trials that have not begun."""
        return self.total - self.done - self.failed - self.running

    def text(self) -> str:
        """`9/20 done · 2 running · 0 failed · 9 left · 0:27 elapsed · ~0:31 to go`."""
        counts = f"{self.done}/{self.total} done · {self.running} running · {self.failed} failed · {self.left} left"
        to_go = f" · ~{clock(self.left_s)} to go" if self.left_s is not None else ""
        return f"{counts} · {clock(self.elapsed_s)} elapsed{to_go}"


class Pace:
    """Seconds that the steps left will take, by what the steps of this session took."""

    def __init__(self) -> None:
        self._from: tuple[float, int] | None = None

    def seconds(self, now: float, run: int, left: int) -> float | None:
        """None before a step was made: what a trial takes to start is no pace.

        Args:
            now: seconds on any clock.
            run: steps made so far.
            left: steps to make.
        """
        if self._from is None or run <= self._from[1]:
            self._from = now, run
            return None
        began, before = self._from
        return left * (now - began) / (run - before)


def progress(
    rows: Sequence[Row], latest: Mapping[str, Latest], total: int, steps: int, now: float, began: float, pace: Pace
) -> Progress:
    """
    Args:
        rows: of trials.csv.
        latest: what trials that run, or ended without a row's numbers, have said.
        total: trials of the plan.
        steps: of a trial.
        now: seconds on the clock by which the session `began`.
    """
    status = [row["status"] for row in rows]
    running = [row for row in rows if row["status"] == "running"]
    run = sum(int(row.get("steps") or latest.get(str(row["trial_id"]), Latest()).step) for row in rows)
    left = steps * (total - len(rows)) + sum(
        max(0, steps - latest.get(str(row["trial_id"]), Latest()).step) for row in running
    )
    return Progress(
        total=total,
        done=status.count("completed") + status.count("stopped"),
        failed=status.count("failed"),
        running=len(running),
        steps_run=run,
        steps_left=left,
        elapsed_s=now - began,
        left_s=pace.seconds(now, run, left),
    )


def trial_lines(
    rows: Sequence[Row], latest: Mapping[str, Latest], steps: int, tolerance: float | None, room: int
) -> list[TrialLine]:
    """Trials that run, then those that ended, the last first, in at most `room` lines.

    Args:
        rows: those that ended in the order in which they did.
    """
    running = [row for row in rows if row["status"] == "running"]
    ended = [row for row in reversed(rows) if row["status"] != "running"]
    chosen = [*running, *ended][: max(0, room)]
    return [_line(row, latest.get(str(row["trial_id"]), Latest()), steps, tolerance) for row in chosen]


def _line(row: Row, latest: Latest, steps: int, tolerance: float | None) -> TrialLine:
    with_kl = row["beta_kl"] != 0
    running = row["status"] == "running"
    step = int(row.get("steps") or latest.step)
    reroute = latest.reroute if running else row.get("eval_loss_reroute")
    drift = latest.drift if running else row.get("eval_benign_kl")
    regression, state = _judged(row, tolerance)
    return TrialLine(
        phase=str(row["phase"]),
        beta_kl=number(row["beta_kl"]) if with_kl else "0",
        temperature=temperature(row["kl_temperature"]) if with_kl else "–",
        seed=str(row["seed"]),
        step=f"{step}/{steps}" if step or not running else "starting",
        reroute="–" if reroute is None else f"{reroute:.4f}",
        drift="–" if drift is None else number(drift),
        regression=regression,
        state=state,
    )


def _judged(row: Row, tolerance: float | None) -> tuple[str, State]:
    """How much rerouting a trial lost, against what it may lose, in words; and what it came to."""
    if row["status"] == "running":
        return "…", "running"
    if row["status"] == "failed":
        return f"failed: {row['error']}", "failed"
    if row["status"] == "stopped":
        return "stopped: over", "stopped"
    if row["phase"] == "baseline":
        return "–", "baseline"
    if tolerance is None or row["reroute_regression"] is None:
        return "not known yet", "baseline"
    lost = row["reroute_regression"] + tolerance
    if row["feasible"]:
        return f"{lost:+.3f} ok", "ok"
    return f"{lost:+.3f} over {number(tolerance, 2)}", "over"


def best_so_far(decision: Decision | None) -> str:
    """What would be chosen at this moment, in a line."""
    if decision is None or decision.baseline is None or not decision.settings:
        return "none yet: the baseline comes first"
    if decision.verdict == "choose":
        return (
            f"{number(decision.beta_kl or 0)} at T {temperature(decision.kl_temperature or 1)}: "
            f"drift {number(decision.eval_benign_kl or 0)}, {percent(decision.drift_kept or 0)} of baseline, "
            f"{with_relation('P(ok)', decision.probability_feasible or 0)}"
        )
    nearest = max(decision.settings, key=lambda setting: setting.probability_feasible)
    return (
        f"none: {number(nearest.beta_kl)} at T {temperature(nearest.kl_temperature)} comes nearest, "
        f"{with_relation('P(ok)', nearest.probability_feasible)}, asked {number(decision.confidence)}"
    )


def heartbeat(at: Progress) -> str:
    """How far the sweep is, in a line for where none moves."""
    counts = f"{at.done} done, {at.running} running, {at.failed} failed, {at.left} left of {at.total}"
    to_go = "" if at.left_s is None else f" · about {clock(at.left_s)} to go"
    return f"{clock(at.elapsed_s):>5} {counts}{to_go}"[:WIDTH]
