"""One driver's work on a sweep: fill the cache, run what the plan gives on Ray Tune, keep the run directory up to date.

A sweep is one session, and another for each time that it is resumed.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.behaviour.judge import DEFAULT_LIMITS, BehaviourLimits
from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide
from analysis.decision import Decision
from analysis.report.commands import commands_after
from cbtrain.calibration.outcome import Calibration, steps_allowed
from cbtrain.config import cli
from cbtrain.teacher_cache.plan import CachePlan
from cbtrain.utils.environment import log_to
from sweeps.execution.behaviour import BehaviourError, Meter, behaviour_sentences, file_of, subjects
from sweeps.execution.calibration import calibrate_before, spent, summary, told, with_recipe
from sweeps.execution.context import TrialContext
from sweeps.execution.searcher import PlanSearcher
from sweeps.execution.teacher_cache import with_teacher
from sweeps.execution.tuning import run_trials
from sweeps.plan.budget import PlanSettings
from sweeps.plan.early_stopping import StopRule, rule_for
from sweeps.plan.journal import TrialSpec
from sweeps.plan.plan import SweepPlan
from sweeps.reporting.console import noise_lines, wrapped
from sweeps.reporting.live import Trials
from sweeps.reporting.progress import Row
from sweeps.reporting.screen import SCREEN
from sweeps.reporting.shares import shares
from sweeps.reporting.shares import told as told_shares
from sweeps.reporting.summary import stopped_lines, summary_lines
from sweeps.runtime.failures import last_words, told_in_a_line
from sweeps.runtime.output import output_to
from sweeps.runtime.processes import Processes
from sweeps.storage.journal_file import open_journal
from sweeps.storage.room import Room, TrialFiles
from sweeps.storage.run_directory import RunDirectory

LOG = "driver"
"""Of `logs/`, without its suffix: what libraries print in the driver's process."""
EXIT_STATUS = {"baseline_never_rerouted": 3, "baseline_failed": 3, "no_setting_behaves": 3}


@dataclass
class SweepDriver:
    """A sweep from here to its end; the driver holds the run directory's lock."""

    run: RunDirectory
    settings: PlanSettings
    concurrency: int
    ended_before: int = 0
    """Trials that had ended when the sweep was resumed."""
    early_stop: bool = False
    """Whether search trials end themselves by a `StopRule`."""
    behaviour_prompts: int = 0
    """Held-out prompts of each kind on which baseline and chosen setting are measured in the end; 0 measures none."""
    judge: str = ""
    """`module:function` of a user's classifier for their completions."""
    limits: BehaviourLimits = DEFAULT_LIMITS
    """What a setting may do to what the model writes."""
    max_failures: int = 1
    """How often a trial that fails goes on from its checkpoint."""
    retry_failed: bool = False
    """Whether trials that have failed run again."""
    calibrate: bool = False
    """Whether a recipe is looked for before the first trial."""
    fixed: tuple[str, ...] = ()
    """Fields of the recipe that stay as they are."""

    def __post_init__(self) -> None:
        self._plan = SweepPlan(self.settings, open_journal(self.run.journal))
        if self.retry_failed:
            self._plan.retry_failed()
        self._spent_before = float(self.run.record.get("wall_s") or 0.0)
        self._started = time.monotonic()
        self._noise_told = False
        self._cleared: set[str] = set()
        self._kept: Processes | None = None
        """Where trials run, unless Ray Train starts workers for each."""

    def sweep(self, context: TrialContext, cache: CachePlan) -> int:
        """Run the plan to its end; the exit status."""
        log_to(self.run.path / "logs" / f"{LOG}.log")
        if context.workers.in_process:
            self._kept = Processes(context.workers, self.concurrency)
        try:
            # What libraries print, those written in C included, would tear what stays in place.
            with (
                last_words(self.run.shown),
                SCREEN.kept_apart(),
                output_to(self.run.path, LOG),
                told_in_a_line(self.run.path, self.run.shown, Path("logs", f"{LOG}.log")),
            ):
                return self._run(context, cache)
        except BaseException as stop:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                status = "failed" if isinstance(stop, Exception) else "interrupted"
                self.run.update(status=status, wall_s=self._wall_s())
            if isinstance(stop, KeyboardInterrupt):
                ended = sum(row["status"] != "running" for row in self._plan.rows())
                print("\n".join(stopped_lines(ended, self._plan.budget.total, self.run.shown)), file=sys.stderr)
            raise

    def _run(self, context: TrialContext, cache: CachePlan) -> int:
        if not self._plan.done:
            context = with_teacher(context, cache, self._kept, self.run)
            if self.calibrate and not self.run.record.get("calibration"):
                found = self._calibrate(context)
                if not found.converged:
                    return self._not_calibrated(found.reason)
                context = self._with_recipe(context, found)
            self._tune(context)
        self._measure_behaviour(context)
        return self.conclude()

    def _calibrate(self, context: TrialContext) -> Calibration:
        """Look for a recipe, and keep it with all that follows from it in one write."""
        trials = self._plan.budget.total
        allowed = steps_allowed(trials, context.config.steps)
        with SCREEN.phase("calibrate", f"by runs of at most {allowed:,} steps in all"):
            found = calibrate_before(context, allowed, self.fixed, self._kept)
        SCREEN.say(*told(found, trials, self._at_a_time(context)), "")
        changed: dict[str, Any] = {"calibration": summary(found)}
        if found.converged:
            changed["config"] = dataclasses.asdict(self._with_recipe(context, found).config)
            changed["config_overrides"] = self.run.record["config_overrides"] | found.settings
        self.run.update(**changed)
        return found

    def _with_recipe(self, context: TrialContext, found: Calibration) -> TrialContext:
        return with_recipe(context, found, given=self.run.record["config_overrides"])

    def _at_a_time(self, context: TrialContext) -> int:
        """Trials that each have as much to run on as a calibration run; in one process they share its cores."""
        return 1 if context.workers.in_process else self.concurrency

    def _not_calibrated(self, reason: str) -> int:
        """Record that the sweep ends before its first trial; the exit status."""
        self.run.update(status="finished", wall_s=self._wall_s())
        help_with = "longer runs (--steps), another --lr or --retain-scale, or other rows"
        following = f"next      {help_with}; the runs are in {self.run.shown}/calibration.json"
        SCREEN.conclude(*wrapped(f"No trial was run: {reason}"), *wrapped(following))
        return EXIT_STATUS["baseline_never_rerouted"]

    def conclude(self) -> int:
        """Record that the sweep is over and print what came of it; the exit status."""
        rows, wall_s, decision = self._plan.rows(), self._wall_s(), self._decide()
        named = {suspect.trial_id for suspect in decision.suspects}
        rows = [row | {"suspect": row["trial_id"] in named} for row in rows]
        self._keep(rows)
        self._plan.note(decision)
        self.run.update(status="finished")
        behaviour = behaviour_sentences(load_behaviour(self.run.path, self._plan.table()), decision)
        record, table = self.run.record | {"run_dir": str(self.run.shown)}, pd.DataFrame(rows)
        lines = summary_lines(
            rows,
            decision,
            wall_s,
            self.concurrency,
            self.run.shown,
            total=self._plan.budget.total,
            commands=commands_after(decision, record, table, self.run.shown),
            before=self.ended_before,
            behaviour=behaviour,
            profile=told_shares(shares(rows, self.run.path / "trials", wall_s, self.concurrency)),
        )
        calibration = self.run.record.get("calibration")
        SCREEN.end()
        SCREEN.conclude(*lines, *(spent(calibration) if calibration else []))
        return EXIT_STATUS.get(decision.verdict, 0)

    def concluded(self) -> int | None:
        """The exit status of a sweep that is over, with what came of it said again; None where anything is left."""
        calibrated = self.run.record.get("calibration")
        if calibrated and not calibrated["converged"]:
            return self._not_calibrated(calibrated["reason"])
        return None if not self._plan.done or self._unmeasured() else self.conclude()

    def _decide(self, rows: Sequence[Row] | None = None) -> Decision:
        """Of these rows, or all of the plan's, by the behaviour measured so far."""
        table = pd.DataFrame(list(self._plan.rows() if rows is None else rows))
        return decide(
            table,
            reroute_tolerance=self.settings.reroute_tolerance,
            confidence=self.settings.confidence,
            trained=self.run.record.get("config", {}),
            searched=self.settings.searched,
            behaviour=load_behaviour(self.run.path, table),
            limits=self.limits,
        )

    def _unmeasured(self) -> list[TrialSpec]:
        """The trials whose behaviour is wanted and not on disk; the sweep is over."""
        if not self.behaviour_prompts:
            return []
        wanted = subjects(self._plan.rows(), self._decide())
        return [spec for spec in wanted if not file_of(self.run.path, spec).exists()]

    def _measure_behaviour(self, context: TrialContext) -> None:
        """Measure baseline and pick, and where the pick breaks it the next one; a line why where that fails, since the
        decision stands without it."""
        SCREEN.begin("deciding", "what would be chosen")
        specs = self._unmeasured()
        if not specs:
            return
        SCREEN.begin("behaviour", "loads the model")
        a_worker = dataclasses.replace(context.workers, count=1)
        processes = self._kept or Processes(a_worker, min(self.concurrency, len(specs)))
        try:
            meter = Meter(context, processes, self.behaviour_prompts, self.judge)
            while specs:
                most, seconds = f"at most {self.behaviour_prompts} prompts", meter.expected_seconds(specs)
                what = f"{len(specs) + 1} models answer {most} a kind, in at most {seconds:.0f} s"
                SCREEN.begin("behaviour", what)
                meter.measure(specs)
                SCREEN.begin("deciding", "what would be chosen")
                specs = self._unmeasured()
        except BehaviourError as error:
            SCREEN.say(*wrapped(f"behaviour not measured: {error}"))
        finally:
            SCREEN.end()
            processes.end()

    def _wall_s(self) -> float:
        """Seconds of all sessions, up to the last event of those that were killed."""
        return self._spent_before + time.monotonic() - self._started

    def _keep(self, rows: list[dict[str, object]]) -> None:
        """Bring the run directory up to what the journal knows."""
        self.run.write_trials(rows)
        self.run.update(tolerance=self._plan.tolerance, wall_s=self._wall_s())
        ended = {str(row["trial_id"]) for row in rows if row["status"] != "running"}
        self.run.remove_checkpoints(ended - self._cleared)
        self._cleared = ended

    def _tune(self, context: TrialContext) -> None:
        """Run the plan's trials on Ray Tune."""
        self._tell_noise()
        ended = [row for row in self._plan.rows() if row["status"] != "running"]
        trials = Trials(self._plan, context.config.steps, self.run.path / "trials", self._decide, ended)

        def on_change() -> None:
            rows = self._plan.rows()
            self._keep(rows)
            trials.update([row for row in rows if row["status"] != "running" or row["trial_id"] in searcher.given])
            self._tell_noise()

        def rule(spec: TrialSpec) -> StopRule | None:
            if not self.early_stop:
                return None
            return rule_for(spec, self._plan, self.run.path / "trials", context.config.steps)

        room = Room(self.run.path, self.run.shown, TrialFiles.of(context.config))
        room.require(self._plan.budget.total - len(ended), self.concurrency)
        searcher = PlanSearcher(
            self._plan,
            on_change,
            rule,
            self._kept,
            self.max_failures,
            on_retry=self._tell_again,
            on_no_room=room.ran_out,
            before_each=room.require,
        )

        def ask() -> None:
            searcher.interrupted = True
            context.stop_file.ask()
            SCREEN.say(cli.WILL_STOP)

        context.stop_file.begin()
        with trials.shown(), cli.asked_first(ask):
            run_trials(searcher, context, self._kept, self.concurrency)
        if searcher.interrupted:
            raise KeyboardInterrupt
        if searcher.failure is not None:
            raise searcher.failure

    def _tell_again(self, trial_id: str, why: str) -> None:
        SCREEN.say(*wrapped(f"again     {trial_id} failed: {why}"))

    def _tell_noise(self) -> None:
        """Say once, as soon as the baseline is in, where seeds differ too much for the limit."""
        if self._noise_told or self._plan.tolerance is None:
            return
        self._noise_told = True
        if not self._plan.stopped_because:
            SCREEN.say(*noise_lines(self._plan.rows(), self._plan.tolerance, self.settings))
