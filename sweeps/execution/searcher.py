"""The Ray Tune side of `SweepPlan`: a Searcher that asks the plan for trials and tells it how they ended.

Ray logs an exception raised in a searcher and goes on, or ends in a place far from its cause. Here the first one is
kept in `PlanSearcher.failure`, no further trials are given, and the caller raises it when `Tuner.fit()` returns.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, cast, get_args

from ray.tune.result import AUTO_RESULT_KEYS, DEFAULT_EXPERIMENT_INFO_KEYS, DEFAULT_RESULT_KEYS, DONE
from ray.tune.search.searcher import Searcher

from analysis.columns import PLAN_COLUMNS
from sweeps.plan.early_stopping import StopRule
from sweeps.plan.journal import Status, TrialOutcome, TrialSpec
from sweeps.plan.outcomes import REQUIRED_METRICS
from sweeps.plan.plan import SweepPlan
from sweeps.runtime.failures import LOST
from sweeps.runtime.interruption import INTERRUPTED
from sweeps.runtime.processes import Processes, nothing

RAY_KEYS = {*AUTO_RESULT_KEYS, *DEFAULT_EXPERIMENT_INFO_KEYS, *DEFAULT_RESULT_KEYS, DONE}
"""What Ray adds to a result; the rest is the trial's own. Nested ones arrive as `config/seed`."""


def _never(_spec: TrialSpec) -> None:
    """The rule of a caller that stops no trial early."""


class PlanSearcher(Searcher):
    """Gives each Tune trial a `TrialSpec` as its config: its fields, and where the trial has them `stop_rule` and
    `process`, the index of the kept process that it runs in.

    A trial function ends by reporting `status` ("completed", "stopped" or "failed"), `error` and the metric columns.
    One that reports `INTERRUPTED` has no outcome: the sweep that is resumed asks for it first.
    """

    def __init__(
        self,
        plan: SweepPlan,
        on_change: Callable[[], None] = nothing,
        rule_for: Callable[[TrialSpec], StopRule | None] = _never,
        processes: Processes | None = None,
        max_failures: int = 0,
        on_retry: Callable[[str, str], None] = nothing,
        on_no_room: Callable[[str], None] = nothing,
        before_each: Callable[[], None] = nothing,
    ) -> None:
        """
        Args:
            plan: where trials come from.
            on_change: called after each trial given and each outcome taken, to rewrite trials.csv.
            rule_for: when the trial that is about to be given stops early; None where it does not.
            processes: the kept ones, of which each trial that runs has one.
            max_failures: how often a trial that fails is given again; one whose loss was not finite is not.
            on_retry: called with the plan's trial and why it is given again, in a line.
            on_no_room: called with why a trial could not write its files, and raises; the trial has no outcome then.
            before_each: called before a trial is given; raises where none shall be.
        """
        super().__init__()
        self.plan = plan
        self.failure: Exception | None = None
        self.interrupted = False
        """Set by the driver: no further trials are given."""
        self._on_change = on_change
        self._rule_for = rule_for
        self._trial_ids: dict[str, str] = {}
        self._processes = processes
        self._taken: dict[str, int] = {}
        self._max_failures = max_failures
        self._on_retry = on_retry
        self._on_no_room = on_no_room
        self._before_each = before_each
        self._failures: Counter[str] = Counter()
        self._halvings: Counter[str] = Counter()

    @property
    def given(self) -> set[str]:
        """Ids of the plan's trials that this searcher has given."""
        return set(self._trial_ids.values())

    def suggest(self, trial_id: str) -> dict[str, object] | str | None:
        """The config of the Tune trial `trial_id`; None when nothing can start now, FINISHED when nothing more will."""
        if self.failure is not None or self.interrupted or self.plan.done:
            return Searcher.FINISHED
        try:
            process = self._processes.take() if self._processes else None
            if self._processes and process is None:
                return None
            self._before_each()
            spec = self.plan.ask()
            if spec is None:
                if self._processes and process is not None:
                    self._processes.give_back(process)
                return None
            self._trial_ids[trial_id] = spec.trial_id
            rule = self._rule_for(spec)
            self._on_change()
        except Exception as failure:
            self.failure = failure
            return Searcher.FINISHED
        given = asdict(spec) | ({"stop_rule": rule} if rule else {})
        if process is not None:
            self._taken[trial_id] = given["process"] = process
        if halvings := self._halvings[spec.trial_id]:
            given["halvings"] = halvings
        return given

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        """Tell the plan how the Tune trial `trial_id` ended, by the last result that it reported."""
        try:
            if (result or {}).get("status") == INTERRUPTED:
                if self._processes is not None:
                    self._processes.give_back(self._taken.pop(trial_id))
                return
            outcome, kind = outcome_of(result, crashed=error), "lost" if error else (result or {}).get("failure")
            if self._processes is not None:
                process, lost = self._taken.pop(trial_id), kind == "lost" and not error
                if outcome.status == "failed" and not lost:
                    self._processes.restart(process)  # what it left there may be what made it fail
                else:
                    self._processes.give_back(process, lost=lost)
            name = self._trial_ids[trial_id]
            if kind == "no_room":
                self._on_no_room(f"{name}: {outcome.error}")
            again = self._again(name, outcome, kind) if outcome.status == "failed" else ""
            if again:
                self.plan.give_again(name)
                self._on_retry(name, again)
            else:
                self.plan.tell(name, self._counted(name, outcome))
            self._on_change()
        except Exception as failure:
            self.failure = self.failure or failure

    def begin_again(self, why: str) -> None:
        """Tune has ended in the midst, and another one will ask: what ran is given again, on processes started anew."""
        for process in self._taken.values():
            assert self._processes is not None
            self._processes.restart(process)
        self._taken.clear()
        for name in self.plan.give_running_again():
            self._failures[name] += 1
            self._on_retry(name, f"{why}; it goes on from its checkpoint, if it has one")

    def _again(self, name: str, outcome: TrialOutcome, kind: object) -> str:
        """Why and how a trial that failed is given again, in a line; empty where it is not."""
        if kind == "non_finite" or self._failures[name] >= self._max_failures:
            return ""
        self._failures[name] += 1
        how = "it goes on from its checkpoint, if it has one, on another process"
        if kind == "out_of_memory":
            self._halvings[name] += 1
            how += ", with half the rows at a time and twice the accumulation"
        return f"{outcome.error}; {how}"

    def _counted(self, name: str, outcome: TrialOutcome) -> TrialOutcome:
        """The outcome with how many attempts failed before."""
        failures = self._failures[name]
        return replace(outcome, metrics=outcome.metrics | {"failures": failures}) if failures else outcome

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the plan's journal is the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Refused: a sweep is continued by a new Tuner over a plan rebuilt from its journal."""
        raise RuntimeError("a sweep is continued from its journal, not by Tuner.restore")


def outcome_of(result: Mapping[str, object] | None, *, crashed: bool) -> TrialOutcome:
    """The outcome in a trial's last reported result.

    Args:
        result: what was reported last, with Ray's own keys; None where nothing was.
        crashed: whether the trial ended by an exception or the loss of its process.
    """
    reported: dict[str, Any] = {
        name: value for name, value in (result or {}).items() if name.split("/")[0] not in RAY_KEYS
    }
    error = " ".join(str(reported.get("error") or "").split())
    status: Status = "failed"
    if crashed:
        error = error or LOST
    elif reported.get("status") in get_args(Status):
        status = cast(Status, reported["status"])
    else:
        error = f"ended without reporting how (status {reported.get('status')!r})"
    numbers = {name: value for name, value in reported.items() if name not in (*PLAN_COLUMNS, "failure")}
    required = {name: numbers.pop(name, None) for name in REQUIRED_METRICS}
    metrics = {name: value for name, value in numbers.items() if isinstance(value, (int, float, str))}
    return TrialOutcome(status=status, **required, metrics=metrics, error=error)
