"""What a sweep came to, what it cost, and what to do next."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

from analysis.decision import Decision
from analysis.formatting import count, with_relation
from analysis.report.commands import folded
from analysis.report.wording import explanation, suspect_lines
from sweeps.reporting.console import INDENT, wrapped
from sweeps.reporting.progress import Row
from sweeps.reporting.screen import WIDTH


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


def stopped_lines(ended: int, total: int, run_dir: Path) -> list[str]:
    """What an interrupted sweep leaves, and the command that goes on with it."""
    return [
        f"stopped   {ended} of {count(total, 'trial')} ended: {run_dir}/trials.csv",
        f"next      python sweeps/kl_ablation.py --resume {shlex.quote(str(run_dir))}",
    ]
