"""Which trial comes next: baseline → ablation → search → confirm, within one total of trials.

`SweepPlan.ask()` gives a trial to run and `tell()` takes its outcome, in any order and with any number running.
Everything is kept in an Optuna storage; a plan over a storage that holds a sweep continues it.
"""

import logging
from collections import Counter
from dataclasses import fields, replace
from typing import Literal

import optuna
import pandas as pd
from optuna.storages import BaseStorage, InMemoryStorage

from analysis.columns import METRIC_COLUMNS, PLAN_COLUMNS
from analysis.constraint import (
    absolute_tolerance,
    baseline_rerouted,
    failed_seeds,
    fails_often,
    probably_feasible,
)
from analysis.decide import decide
from analysis.decision import Decision, SettingAssessment
from analysis.report.wording import headline
from analysis.surrogate.surrogate import MAX_MODELLED, STOPPED_LOSS
from cbtrain.config import InputError
from sweeps.plan.budget import PlanSettings, allocate
from sweeps.plan.dashboard import verdict_note
from sweeps.plan.journal import Entry, Journal, TrialOutcome, TrialSpec
from sweeps.plan.outcomes import checked, completed_loss, metrics_of, regression_of, row_of
from sweeps.plan.sampler import DRAWS_OF_MANY, search_space, suggest

StopReason = Literal["", "baseline_never_rerouted", "baseline_failed"]

LEADERS = 2
"""So many baselines go ahead of the other trials: the second runs before them where the first has not rerouted."""
RUNNING_SHARE = 0.5
"""A search trial starts when none runs, or fewer than this share of those still to be asked for: a short search learns
from every result, and its last trials rest on nearly all of them."""


NON_FINITE = "NonFiniteLossError"
"""How the error of a trial begins that would fail again at the same step."""


class SweepPlan:
    """The trials of one sweep, asked for and told one at a time. Not for use by several threads at once."""

    def __init__(self, settings: PlanSettings, storage: BaseStorage | None = None) -> None:
        """Begin a sweep, or continue the one in `storage` (None keeps it in memory).

        Trials of that sweep which were running are asked for again, first and under their own ids.

        Raises:
            InputError: the number of trials is too small for a sweep, or `storage` holds one with other settings.
                Only `num_samples` may differ.
        """
        _quiet_optuna()
        allocate(settings)  # before anything is written
        self._journal = Journal(storage or InMemoryStorage(), search_space(settings))
        self.settings = _as_begun(settings, self._journal)
        self.budget = allocate(self.settings)
        self._entries = self._journal.entries
        self._interrupted: list[TrialSpec] = []
        self.give_running_again()
        self._settle()

    def ask(self) -> TrialSpec | None:
        """The next trial to run, or None when nothing can start before a running trial ends (or ever)."""
        if self._interrupted:
            return self._interrupted.pop(0)
        if self.stopped_because:
            return None
        asked = Counter(entry.spec.phase for entry in self._entries.values())
        if asked["baseline"] < self.budget.baseline:
            return self._journal.add("baseline", 0.0, 1.0, self.settings.seed + asked["baseline"])
        if asked["ablation"] < self.budget.ablation:
            point = self.settings.ablation_points[asked["ablation"]]
            return self._journal.add("ablation", *point, self._first_seed())
        if not self._fixed_part_in() or len(self._entries) >= self.budget.total:
            return None
        to_search = self.budget.search - asked["search"]
        if to_search > 0:
            return self._search(asked["search"]) if self._running() < max(1, to_search * RUNNING_SHARE) else None
        # The pick rests on all that the search found. Of confirmations one need not wait for the other: it would be no
        # better (`bench_search`), and would keep a slot for the length of a trial.
        searching = any(entry.outcome is None and entry.spec.phase != "confirm" for entry in self._entries.values())
        return None if searching else self._confirm(asked["search"])

    def tell(self, trial_id: str, outcome: TrialOutcome) -> None:
        """Take the outcome of a trial that was asked for. It is stored before this returns.

        A completed outcome with a missing or non-finite metric is kept as failed, with an error naming the metric.

        Raises:
            KeyError: no such trial was asked for.
            ValueError: the trial has an outcome already.
        """
        entry = self._entries[trial_id]
        if entry.outcome is not None:
            raise ValueError(f"{trial_id}: told twice, first as {entry.outcome.status}")
        self._interrupted = [spec for spec in self._interrupted if spec.trial_id != trial_id]
        self._journal.record(entry, checked(outcome))
        self._settle()

    def give_again(self, trial_id: str) -> None:
        """Have a trial that runs no more, and has no outcome, asked for again before any other.

        Raises:
            ValueError: the trial has an outcome.
        """
        entry = self._entries[trial_id]
        if entry.outcome is not None:
            raise ValueError(f"{trial_id}: has ended as {entry.outcome.status}")
        self._interrupted.insert(0, entry.spec)

    def give_running_again(self) -> list[str]:
        """Have all trials without an outcome asked for again, before any other; their ids."""
        self._interrupted = [entry.spec for entry in self._entries.values() if entry.outcome is None]
        return [spec.trial_id for spec in self._interrupted]

    def retry_failed(self) -> None:
        """Have every trial that failed asked for again, under its own id; not one whose loss was not finite."""
        ended = [(entry, entry.outcome) for entry in self._entries.values() if entry.outcome is not None]
        failed = [(entry, outcome.error) for entry, outcome in ended if outcome.status == "failed"]
        again = [entry for entry, error in failed if not error.startswith(NON_FINITE)]
        self._interrupted += [self._journal.again(entry) for entry in again]

    @property
    def done(self) -> bool:
        """Whether every trial asked for has ended and no more will be given."""
        finished = len(self._entries) >= self.budget.total or self.stopped_because != ""
        return finished and self._running() == 0

    @property
    def ended(self) -> int:
        """Trials that have an outcome."""
        return len(self._entries) - self._running()

    @property
    def tolerance(self) -> float | None:
        """The allowed rise of `eval_loss_reroute`; None until the baseline is in, or where none completed."""
        if not self._baseline_in() or not self._baseline_losses():
            return None
        return absolute_tolerance(self._baseline_losses().values(), self.settings.reroute_tolerance)

    @property
    def stopped_because(self) -> StopReason:
        """Why the sweep ends before its budget is spent; empty while it does not."""
        losses = self._baseline_losses()
        seeds = [entry.spec.seed for entry in self._baselines()[:LEADERS]]
        ahead_ended = all(seed in losses for seed in seeds) and len(seeds) == min(LEADERS, self.budget.baseline)
        if ahead_ended and not any(baseline_rerouted([loss]) for loss in losses.values()):
            return "baseline_never_rerouted"  # the others would be paid for in vain
        if not self._baseline_in():
            return ""
        if not losses:
            return "baseline_failed"
        failed = len(losses) - len(self.sound_baselines())
        vain = fails_often(failed, len(losses)) or not baseline_rerouted(losses.values())
        return "baseline_never_rerouted" if vain else ""

    def rows(self) -> list[dict[str, object]]:
        """One row for each trial asked for, in that order, with the columns of trials.csv; None is not known."""
        baseline, tolerance = self.sound_baselines(), self.tolerance
        reported = {name for entry in self._entries.values() for name in metrics_of(entry)}
        names = (*METRIC_COLUMNS, *sorted(reported - {*METRIC_COLUMNS, *PLAN_COLUMNS}))
        return [row_of(entry, names, baseline, tolerance) for entry in self._entries.values()]

    def table(self) -> pd.DataFrame:
        """`rows` as a table."""
        return pd.DataFrame(self.rows())

    def note(self, decision: Decision) -> None:
        """Keep what came of the sweep where the Optuna dashboard shows it."""
        self._journal.note(headline(decision), verdict_note(decision, self.rows(), self._journal.numbers()))

    def _running(self) -> int:
        return sum(entry.outcome is None for entry in self._entries.values())

    def _baselines(self) -> list[Entry]:
        return [entry for entry in self._entries.values() if entry.spec.phase == "baseline"]

    def _baseline_in(self) -> bool:
        ended = sum(entry.outcome is not None for entry in self._baselines())
        return ended >= self.budget.baseline and ended == len(self._baselines())

    def _fixed_part_in(self) -> bool:
        """Whether baseline and ablation have ended: a search that starts on less spends its trials on guesses."""
        fixed = [entry for entry in self._entries.values() if entry.spec.phase in ("baseline", "ablation")]
        return self._baseline_in() and all(entry.outcome is not None for entry in fixed)

    def _baseline_losses(self) -> dict[int, float]:
        """`eval_loss_reroute` by seed of the baselines that completed."""
        losses = {entry.spec.seed: completed_loss(entry) for entry in self._baselines()}
        return {seed: loss for seed, loss in losses.items() if loss is not None}

    def sound_baselines(self) -> dict[int, float]:
        """Those of `_baseline_losses` whose seed did not fail: what trials are compared with, and their seeds."""
        losses = self._baseline_losses()
        if not losses:
            return {}
        failed = failed_seeds([*losses.values()])
        return {seed: loss for (seed, loss), out in zip(losses.items(), failed, strict=True) if not out}

    def _first_seed(self) -> int:
        """The first baseline's seed, or of the next whose baseline is not known to have failed."""
        failed = self._baseline_losses().keys() - self.sound_baselines().keys()
        seeds = [entry.spec.seed for entry in self._baselines()]
        return next(seed for seed in seeds if seed not in failed)

    def _settle(self) -> None:
        """Tell Optuna of the ended trials, the searched ones only when the baseline gives them their constraint."""
        baseline, tolerance, in_ = self.sound_baselines(), self.tolerance, self._baseline_in()
        for entry in self._entries.values():
            if entry.outcome is None or entry.settled or not (in_ or entry.spec.phase == "baseline"):
                continue
            constraint = None if entry.spec.phase == "baseline" else regression_of(entry, baseline, tolerance)
            if entry.outcome.status == "stopped" and tolerance is not None:
                constraint = (STOPPED_LOSS - 1) * tolerance
            self._journal.settle(entry, constraint)

    def _search(self, index: int) -> TrialSpec:
        seeds = list(self.sound_baselines())
        seed = seeds[index % len(seeds)]
        return self._journal.add("search", *suggest(self._journal.searched, self.table, self.settings, seed), seed)

    def _confirm(self, searched: int) -> TrialSpec:
        """The current pick on a baseline seed it has not had, or the next best setting that has one to spare.

        Where no setting completed a trial, the search goes on instead.
        """
        # Of many trials few draws tell what to look at again, in a third of the time.
        draws = DRAWS_OF_MANY if len(self._entries) > MAX_MODELLED else None
        decision = decide(
            self.table(),
            reroute_tolerance=self.settings.reroute_tolerance,
            confidence=self.settings.confidence,
            searched=self.settings.searched,
            draws=draws,
        )
        seeds = list(self.sound_baselines())
        for setting in sorted(decision.settings, key=lambda setting: not self._deserves_repeat(setting, decision)):
            unseen = [seed for seed in seeds if seed not in self._seeds_of(setting.beta_kl, setting.kl_temperature)]
            if unseen:
                return self._journal.add("confirm", setting.beta_kl, setting.kl_temperature, unseen[0])
        if not decision.settings:
            return self._search(searched)
        fresh = 1 + max(entry.spec.seed for entry in self._entries.values())
        pick = decision.settings[0]
        return self._journal.add("confirm", pick.beta_kl, pick.kl_temperature, fresh)

    def _deserves_repeat(self, setting: SettingAssessment, decision: Decision) -> bool:
        """Whether a setting would be chosen, had its only trial not most likely failed."""
        if not 1 == setting.n_failed == len(self._seeds_of(setting.beta_kl, setting.kl_temperature)):
            return False
        best = decision.settings[0]
        better = not best.qualifies or setting.drift < best.drift
        return better and probably_feasible(setting.probability_feasible, self.settings.confidence)

    def _seeds_of(self, beta_kl: float, kl_temperature: float) -> set[int]:
        specs = [entry.spec for entry in self._entries.values()]
        return {spec.seed for spec in specs if (spec.beta_kl, spec.kl_temperature) == (beta_kl, kl_temperature)}


def _as_begun(settings: PlanSettings, journal: Journal) -> PlanSettings:
    """The settings with the number of baseline seeds that the sweep was begun with, whatever its total is now."""
    begun = journal.pinned()
    if begun is None:
        settings = replace(settings, baseline_seeds=allocate(settings).baseline)
        journal.pin(_fixed(settings))
        return settings
    if settings.baseline_seeds is None:
        settings = replace(settings, baseline_seeds=begun.get("baseline_seeds"))
    now = _fixed(settings)
    other = [name for name in now if now[name] != begun.get(name)]
    if other:
        named = ", ".join(f"{name} {begun.get(name)}, not {now[name]}" for name in other)
        raise InputError(f"the journal holds a sweep with {named}: continue it as it was, or start another")
    return settings


def _fixed(settings: PlanSettings) -> dict[str, object]:
    """What must stay as it is while a sweep goes on, as JSON gives it back."""
    values = {field.name: getattr(settings, field.name) for field in fields(settings) if field.name != "num_samples"}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _quiet_optuna() -> None:
    """Optuna's warnings go to `logging` and its running commentary nowhere."""
    optuna.logging.set_verbosity(logging.WARNING)
    optuna.logging.disable_default_handler()
    optuna.logging.enable_propagation()
