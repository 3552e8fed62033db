"""What a sweep prints: the plan before it starts, a line for each trial event, the summary at the end."""

import contextlib
import math
import shlex
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas as pd
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from analysis.baseline import failed_by_rule, failed_sentence, unconverged_sentence
from analysis.decision import Decision
from analysis.formatting import count, number, percent, with_relation
from analysis.noise import excessive_spread, samples_for, seeds_needed
from analysis.report.commands import folded
from analysis.report.wording import explanation, suspect_lines
from sweeps.plan.budget import PlanSettings
from sweeps.plan.plan import SweepPlan

Row = dict[str, Any]
WIDTH = 80
INDENT = " " * 10
HEADER = " time      phase    beta_kl    T seed"


@dataclass(frozen=True)
class CacheReport:
    """What it took to fill a cache, and what a trial reads from it."""

    rows_computed: int
    teacher_s: float
    """Of which the teacher ran."""
    wall_s: float
    """For loading the model and writing the shards as well."""
    rows_read_by_a_trial: int

    def after(self, earlier: object) -> "CacheReport":
        """The two together, `earlier` being what sweep.json has kept of a session before, if anything."""
        if not isinstance(earlier, dict):
            return self
        sums = {name: getattr(self, name) + earlier.get(name, 0) for name in ("rows_computed", "teacher_s", "wall_s")}
        return replace(self, **sums)


def noise_lines(rows: Sequence[Row], tolerance: float, settings: PlanSettings) -> list[str]:
    """What the spread between the baseline's seeds asks for, where it is large for the limit; else nothing.

    Args:
        rows: of trials.csv, with the whole baseline.
        tolerance: the allowed rise of `eval_loss_reroute`.
        settings: of the sweep.
    """
    completed = [row for row in rows if row["phase"] == "baseline" and row["status"] == "completed"]
    losses = [row["eval_loss_reroute"] for row in completed]
    sigma = excessive_spread(losses, tolerance)
    baselines = pd.DataFrame(completed)
    if completed and (failed := failed_sentence(baselines, failed_by_rule(baselines))):
        return wrapped(f"baseline  {failed}")
    if sigma is None:
        return []
    if unfinished := unconverged_sentence(pd.DataFrame(completed)):
        return wrapped(f"baseline  {unfinished}")
    seeds = seeds_needed(sigma, tolerance)
    samples = samples_for(seeds)
    more = f" (--num-samples {samples})" if samples > settings.num_samples else ""
    if seeds > len(losses):  # which a sweep that goes on cannot have
        samples = max(samples, settings.num_samples)
        more = f" (another sweep, --num-samples {samples} --baseline-seeds {seeds})"
    again = "; settings that ran are repeated where a new one is worth no more" if settings.sampler == "gp" else ""
    return wrapped(
        f"noise     σ {number(sigma, 2)} between seeds is {percent(sigma / tolerance)} of the limit "
        f"{number(tolerance, 2)}: an answer may need up to {seeds} seeds a setting{more}{again}"
    )


def resume_lines(ended: int, total: int, steps: Sequence[int], done: bool) -> list[str]:
    """What a resumed sweep found; `steps` are those from which the interrupted trials go on."""
    found = f"resume    {ended} of {count(total, 'trial')} ended"
    if done:
        more = " (--num-samples N adds trials)" if ended == total else ""
        return wrapped(f"{found}: nothing is left to run{more}")
    if steps:
        places = [f"step {step}" if step else "the start" for step in steps]
        listed = " and from ".join(filter(None, [", ".join(places[:-1]), places[-1]]))
        verb, they = ("was", "it goes") if len(steps) == 1 else ("were", "they go")
        found += f", {len(steps)} {verb} interrupted: {they} on from {listed}"
    return wrapped(found)


def wrapped(text: str) -> list[str]:
    """A labelled text in lines of the screen's width."""
    return textwrap.wrap(text, WIDTH, subsequent_indent=INDENT, break_on_hyphens=False)


def indented(text: str) -> list[str]:
    """What goes on under a label."""
    return textwrap.wrap(text, WIDTH, initial_indent=INDENT, subsequent_indent=INDENT)


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on the terminal, where there is one; yields what moves it on."""
    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount: progress.advance(task, amount)


class EventLines:
    """Prints a line when a trial starts and when it ends, told by comparing the plan with what was printed.

    Args:
        before: rows that are not news.
    """

    def __init__(self, plan: SweepPlan, before: Sequence[Row] = ()) -> None:
        self._plan = plan
        self._printed = {str(row["trial_id"]): str(row["status"]) for row in before}
        self._started = time.monotonic()
        print(HEADER)

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
                print(line, flush=True)


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


def summary_lines(
    rows: Sequence[Row],
    decision: Decision,
    wall_s: float,
    concurrency: int,
    run_dir: Path,
    cache: CacheReport | None = None,
    before: int = 0,
    behaviour: Sequence[str] = (),
    wider: str | None = None,
) -> list[str]:
    """What the sweep did, what it cost and what to do next.

    Args:
        wall_s: of all sessions of the sweep.
        before: trials that had ended when it was resumed.
        behaviour: sentences on what baseline and best setting write.
        wider: the command that sweeps what `Decision.wider` names.
    """
    quoted = shlex.quote(str(run_dir))
    ended = [row for row in rows if row["status"] == "completed"]
    stopped, failed = ([row for row in rows if row["status"] == status] for status in ("stopped", "failed"))
    timed = [*ended, *(row for row in stopped if row["train_s"] is not None)]
    training = sum(row["train_s"] for row in timed)
    lines = [
        "",
        f"{len(rows)} trials{f' ({before} before this session)' if before else ''} in {wall_s:.0f} s · "
        f"{len(ended)} done, {f'{len(stopped)} stopped, ' if stopped else ''}{len(failed)} failed",
        f"cost      training {training:.0f} s = {training / (wall_s * concurrency):.0%} of "
        f"{wall_s:.0f} s × {concurrency} at a time",
        *_overhead(timed),
        *(_spared(cache, len(ended)) if cache else []),
    ]
    return [
        *lines,
        *_found(decision, wider),
        *(line for text in behaviour for line in wrapped(f"behaviour {text}")),
        f"next      python analysis/pick_beta.py {quoted}",
        "          the decision, with its evidence",
        f"          optuna-dashboard {quoted}/study.log",
        "          explore the trials",
    ]


def _times(log_sd: float | None) -> str:
    """A spread of logarithms as the percentage that it is."""
    return "" if log_sd is None else f" ± {100 * math.expm1(log_sd):.0f} %"


def _found(decision: Decision, wider: str | None) -> list[str]:
    """The baseline, and the best setting or why there is none; what lies beyond the ranges, and the way there."""
    lines, baseline = [], decision.baseline
    if baseline is not None:
        spread = "" if baseline.reroute_sd is None else f" ± {baseline.reroute_sd:.4f}"
        lines.append(
            f"baseline  reroute {baseline.eval_loss_reroute:.4f}{spread} over {count(baseline.n_seeds, 'seed')} · "
            f"drift {baseline.drift:.3g}{_times(baseline.drift_sd)} nats/token"
        )
    if decision.verdict == "choose":
        lines.append(
            f"best      beta_kl {decision.beta_kl:.3g}, T {decision.kl_temperature:.3g}: drift "
            f"{decision.eval_benign_kl:.3g} ({decision.drift_kept:.0%} of baseline), "
            f"{with_relation('P', decision.probability_feasible or 0)}{', confirmed' if decision.confirmed else ''}"
        )
        if decision.behaviour_warning:
            lines.append(f"but       {decision.behaviour_warning}")
    else:
        lines += wrapped(f"verdict   {decision.verdict}: {explanation(decision)}")
    for suspect in suspect_lines(decision):
        lines += wrapped(f"suspect   {suspect}")
    if wider is not None:
        lines += wrapped(f"warning   {decision.range_warning}")
        lines += [INDENT + line for line in folded(wider, WIDTH - len(INDENT)).splitlines()]
    return lines


def _spared(cache: CacheReport, trials: int) -> list[str]:
    """What the cache saved, by the seconds that the teacher took for a row when it was filled."""
    read = trials * cache.rows_read_by_a_trial
    line = f"cache     {cache.rows_computed:,} rows through the teacher in place of {read:,}"
    saved = cache.teacher_s / max(cache.rows_computed, 1) * read - cache.wall_s
    if saved > 0:
        line += f", about {saved:.0f} s saved"
    return wrapped(line)


def _overhead(ended: Sequence[Row]) -> list[str]:
    """Seconds of a trial that went neither into training nor evaluation, first trials of a process left out."""
    last_end: dict[str, float] = {}
    own, with_hand_over = [], []
    for row in sorted(ended, key=lambda row: row["ended_at"]):
        work = row["train_s"] + row["eval_s"]
        if row["process"] in last_end:
            own.append(row["wall_s"] - work)
            with_hand_over.append(row["ended_at"] - last_end[row["process"]] - work)
        last_end[row["process"]] = row["ended_at"]
    if not own:
        return []
    return [
        f"{INDENT}overhead {fmean(own):.2f} s a trial, {median(with_hand_over):.2f} s with Ray's hand-over",
        f"{INDENT}(after the first trial of each process)",
    ]
