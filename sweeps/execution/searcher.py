"""The Ray Tune side of `SweepPlan`: a Searcher that asks the plan for trials and tells it how they ended.

Ray logs an exception raised in a searcher and goes on, or ends in a place far from its cause. Here the first one is
kept in `PlanSearcher.failure`, no further trials are given, and the caller raises it when `Tuner.fit()` returns.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, cast, get_args

from ray.tune.result import AUTO_RESULT_KEYS, DEFAULT_EXPERIMENT_INFO_KEYS, DEFAULT_RESULT_KEYS, DONE
from ray.tune.search.searcher import Searcher

from analysis.columns import PLAN_COLUMNS
from sweeps.execution.processes import Processes
from sweeps.plan.early_stopping import StopRule
from sweeps.plan.journal import Status, TrialOutcome, TrialSpec
from sweeps.plan.outcomes import REQUIRED_METRICS
from sweeps.plan.plan import SweepPlan

RAY_KEYS = {*AUTO_RESULT_KEYS, *DEFAULT_EXPERIMENT_INFO_KEYS, *DEFAULT_RESULT_KEYS, DONE}
"""What Ray adds to a result; the rest is the trial's own. Nested ones arrive as `config/seed`."""


def _nothing() -> None:
    """The hook of a caller that has none."""


def _never(_spec: TrialSpec) -> None:
    """The rule of a caller that stops no trial early."""


class PlanSearcher(Searcher):
    """Gives each Tune trial a `TrialSpec` as its config: its fields, and where the trial has them `stop_rule` and
    `process`, the index of the kept process that it runs in.

    A trial function ends by reporting `status` ("completed", "stopped" or "failed"), `error` and the metric columns.
    """

    def __init__(
        self,
        plan: SweepPlan,
        on_change: Callable[[], None] = _nothing,
        rule_for: Callable[[TrialSpec], StopRule | None] = _never,
        processes: Processes | None = None,
    ) -> None:
        """
        Args:
            plan: where trials come from.
            on_change: called after each trial given and each outcome taken, to rewrite trials.csv.
            rule_for: when the trial that is about to be given stops early; None where it does not.
            processes: the kept ones, of which each trial that runs has one.
        """
        super().__init__()
        self.plan = plan
        self.failure: Exception | None = None
        self._on_change = on_change
        self._rule_for = rule_for
        self._trial_ids: dict[str, str] = {}
        self._processes = processes
        self._taken: dict[str, int] = {}

    @property
    def given(self) -> set[str]:
        """Ids of the plan's trials that this searcher has given."""
        return set(self._trial_ids.values())

    def suggest(self, trial_id: str) -> dict[str, object] | str | None:
        """The config of the Tune trial `trial_id`; None when nothing can start now, FINISHED when nothing more will."""
        if self.failure is not None or self.plan.done:
            return Searcher.FINISHED
        try:
            spec = self.plan.ask()
            if spec is None:
                return None
            self._trial_ids[trial_id] = spec.trial_id
            rule = self._rule_for(spec)
            self._on_change()
        except Exception as failure:
            self.failure = failure
            return Searcher.FINISHED
        given = asdict(spec) | ({"stop_rule": rule} if rule else {})
        if self._processes is not None:
            self._taken[trial_id] = self._processes.take()
            given["process"] = self._taken[trial_id]
        return given

    def on_trial_complete(self, trial_id: str, result: Mapping[str, object] | None = None, error: bool = False) -> None:
        """Tell the plan how the Tune trial `trial_id` ended, by the last result that it reported."""
        if self._processes is not None:
            self._processes.give_back(self._taken.pop(trial_id))
        try:
            self.plan.tell(self._trial_ids[trial_id], outcome_of(result, crashed=error))
            self._on_change()
        except Exception as failure:
            self.failure = self.failure or failure

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
        error = error or "its process was lost (killed, or out of memory)"
    elif reported.get("status") in get_args(Status):
        status = cast(Status, reported["status"])
    else:
        error = f"ended without reporting how (status {reported.get('status')!r})"
    numbers = {name: value for name, value in reported.items() if name not in PLAN_COLUMNS}
    required = {name: numbers.pop(name, None) for name in REQUIRED_METRICS}
    metrics = {name: value for name, value in numbers.items() if isinstance(value, (int, float, str))}
    return TrialOutcome(status=status, **required, metrics=metrics, error=error)
