"""What a sweep came to, what it cost, and what to do next."""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from analysis.decision import Decision
from analysis.formatting import count, number, percent, temperature, with_relation
from analysis.report.commands import Commands, folded
from analysis.report.wording import explanation, suspect_lines
from sweeps.reporting.console import INDENT, wrapped
from sweeps.reporting.progress import Row
from sweeps.reporting.screen import WIDTH


def summary_lines(
    rows: Sequence[Row],
    decision: Decision,
    wall_s: float,
    concurrency: int,
    run_dir: Path,
    *,
    total: int,
    commands: Commands,
    before: int = 0,
    behaviour: Sequence[str] = (),
    profile: str = "",
) -> list[str]:
    """What the sweep did, what it cost and what to do next.

    Args:
        wall_s: of all sessions of the sweep.
        total: trials that were planned.
        commands: that would help where nothing can be chosen, and that sweeps what `Decision.wider` names.
        before: trials that had ended when it was resumed.
        behaviour: sentences on what baseline and best setting write.
        profile: where the time went, where that was asked for.
    """
    statuses = ("completed", "stopped", "failed")
    completed, stopped, failed = ([row for row in rows if row["status"] == status] for status in statuses)
    timed = [*completed, *(row for row in stopped if row["train_s"] is not None)]
    training = sum(row["train_s"] for row in timed)
    badge = "finished" if len(rows) == total else "ended early"
    session = f" ({before} before this session)" if before else ""
    cost = f"cost      training {training:.0f} s = {percent(training / (wall_s * concurrency))} of {wall_s:.0f} s × "
    return [
        f"{badge} · {len(rows)} of {count(total, 'trial')}{session} in {wall_s:.0f} s · "
        f"{f'{len(stopped)} stopped, ' if stopped else ''}{len(failed)} failed",
        *_failed(failed),
        *wrapped(f"{cost}{concurrency} at a time{_overhead(timed)}"),
        *wrapped(profile),
        *_found(decision),
        *(line for text in behaviour for line in wrapped(f"behaviour {text}")),
        *_next(decision, commands, shlex.quote(str(run_dir))),
    ]


def _failed(rows: Sequence[Row]) -> list[str]:
    """The first failure and where its traceback is; how many more there are, the badge says."""
    if not rows:
        return []
    log = f" (logs/{rows[0]['trial_id']}.log)"
    line = f"failed    {rows[0]['trial_id']}: {rows[0]['error']}"
    return [line + log if len(line + log) <= WIDTH else f"{line[: WIDTH - len(log) - 1]}…{log}"]


def _next(decision: Decision, commands: Commands, run_dir: str) -> list[str]:
    """Commands: first what would help, where nothing can be chosen, else the decision, which names how to train it."""
    decide = f"python analysis/pick_beta.py {run_dir}"
    helping = commands.wider or ("" if commands.trains else commands.next)
    first = [("next", decide)] if decision.verdict == "choose" else [("next", helping), ("evidence", decide)]
    return [
        line
        for label, command in (*first, ("explore", f"optuna-dashboard {run_dir}/study.log"))
        if command
        for line in labelled(label, command)
    ]


def labelled(label: str, command: str) -> list[str]:
    """A command beside its label, over as many lines as it takes."""
    first, *more = folded(command, WIDTH - len(INDENT)).splitlines()
    return [f"{label:<10}{first}", *(INDENT + line for line in more)]


def _times(log_sd: float | None) -> str:
    """A spread of logarithms as the percentage that it is."""
    return "" if log_sd is None else f" ± {100 * math.expm1(log_sd):.0f} %"


def _found(decision: Decision) -> list[str]:
    """The baseline, and the best setting or why there is none; what lies beyond the ranges, and the way there."""
    lines, baseline = [], decision.baseline
    if baseline is not None:
        spread = "" if baseline.reroute_sd is None else f" ± {baseline.reroute_sd:.4f}"
        lines.append(
            f"baseline  reroute {baseline.eval_loss_reroute:.4f}{spread} over {count(baseline.n_seeds, 'seed')} · "
            f"drift {baseline.drift:.3g}{_times(baseline.drift_sd)} nats/token"
        )
    if decision.verdict == "choose":
        lines += wrapped(
            f"best      {number(decision.beta_kl or 0)} at T {temperature(decision.kl_temperature or 1)}: drift "
            f"{number(decision.eval_benign_kl or 0)} ({percent(decision.drift_kept or 0)} of baseline), "
            f"{with_relation('P', decision.probability_feasible or 0)}{', confirmed' if decision.confirmed else ''}"
        )
        lines += [line for text in _unconfirmed(decision) for line in wrapped(f"but       {text}")]
    else:
        lines += wrapped(f"verdict   {decision.verdict}: {explanation(decision)}")
    for suspect in suspect_lines(decision):
        lines += wrapped(f"suspect   {suspect}")
    if decision.range_warning:
        lines += wrapped(f"warning   {decision.range_warning.partition(':')[0]}")  # the decision has the rest
    return lines


def _unconfirmed(decision: Decision) -> list[str]:
    """What is not known of the setting that would be chosen."""
    seeds = count(decision.n_sound_seeds or 0, "seed")
    once = "" if decision.confirmed else f"not confirmed: it ran on {seeds}, and 3 are needed"
    return [*filter(None, (once, decision.behaviour_warning))]


def _overhead(ended: Sequence[Row]) -> str:
    """Seconds of a trial that went neither into training nor evaluation, first trials of a process left out."""
    last_end: dict[str, float] = {}
    over = []
    for row in sorted(ended, key=lambda row: row["ended_at"]):
        work = row["train_s"] + row["eval_s"]
        if row["process"] in last_end:
            over.append(row["ended_at"] - last_end[row["process"]] - work)
        last_end[row["process"]] = row["ended_at"]
    return f" · overhead {median(over):.2f} s a trial" if over else ""


def stopped_lines(ended: int, total: int, run_dir: Path) -> list[str]:
    """What an interrupted sweep leaves, and the command that goes on with it."""
    return [
        f"stopped   {ended} of {count(total, 'trial')} ended: {run_dir}/trials.csv",
        f"next      python sweeps/kl_ablation.py --resume {shlex.quote(str(run_dir))}",
    ]
