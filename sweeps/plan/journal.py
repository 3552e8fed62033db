"""The sweep's memory: every trial asked for and every result told, in an Optuna storage.

Two studies share the storage: `kl_ablation` holds the searched trials, `kl_ablation_baseline` those at
`beta_kl = 0`, which lies in no logarithmic range and would leave Optuna's model without common parameters.
A trial comes to be in one record and its outcome is one record, so a sweep killed anywhere is read back whole; what
the Optuna dashboard is to show beside them (`sweeps.plan.dashboard`) is not read back.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage
from optuna.trial import TrialState, create_trial

from analysis.columns import Status
from analysis.surrogate.surrogate import MIN_DRIFT
from cbtrain.config import CircuitBreakerConfig
from sweeps.plan.budget import Phase
from sweeps.plan.dashboard import VERDICT, introduce, show_constraint, show_metrics, write_note
from sweeps.plan.sampler import BETA_KL, KL_TEMPERATURE

STUDY_NAME = "kl_ablation"
BASELINE_STUDY_NAME = "kl_ablation_baseline"
CONSTRAINT = "reroute_regression"
SETTINGS = "settings"

Metric = float | int | str


@dataclass(frozen=True)
class TrialSpec:
    """One trial to run: the setting, and the seed of its training."""

    trial_id: str
    phase: Phase
    beta_kl: float
    kl_temperature: float
    seed: int


@dataclass(frozen=True)
class TrialOutcome:
    """How a trial ended. A completed one has the three held-out metrics, all finite."""

    status: Status
    eval_benign_kl: float | None = None
    """KL(teacher‖student) at T = 1 on held-out benign rows, nats per scored token: the objective."""
    eval_loss_reroute: float | None = None
    """Mean ReLU cosine on held-out harmful rows; 1 is where every run starts."""
    eval_harmful_nll: float | None = None
    """Nats per scored prediction on held-out harmful completions."""
    metrics: dict[str, Metric] = field(default_factory=dict)
    """Further columns of trials.csv."""
    error: str = ""
    """What went wrong, or why it was stopped; one line."""


@dataclass
class Entry:
    """A trial as the journal knows it; `outcome` is None while it runs."""

    spec: TrialSpec
    trial: optuna.Trial
    storage_id: int
    outcome: TrialOutcome | None
    settled: bool
    """Whether Optuna was told, after which nothing about the trial changes."""


class Journal:
    """The trials of a sweep in the order of asking, kept in step with the storage, which is written first."""

    def __init__(self, storage: BaseStorage, space: Mapping[str, BaseDistribution]) -> None:
        self._storage = storage
        self._space = dict(space)
        self.searched = _open_study(storage, STUDY_NAME)
        self._baselines = _open_study(storage, BASELINE_STUDY_NAME)
        found = [*self._read(self.searched), *self._read(self._baselines)]
        self.entries: dict[str, Entry] = {
            entry.spec.trial_id: entry for entry in sorted(found, key=lambda entry: int(entry.spec.trial_id[1:]))
        }

    def pinned(self) -> dict[str, Any] | None:
        """The settings that the sweep in this storage was begun with; None where none was."""
        return self.searched.user_attrs.get(SETTINGS)

    def pin(self, settings: Mapping[str, object]) -> None:
        """Keep the settings that a sweep is begun with."""
        self.searched.set_user_attr(SETTINGS, dict(settings))

    def add(self, phase: Phase, beta_kl: float, kl_temperature: float, seed: int) -> TrialSpec:
        """Record a new trial as running, under the next free id."""
        spec = TrialSpec(f"t{len(self.entries):03d}", phase, beta_kl, kl_temperature, seed)
        self.entries[spec.trial_id] = self._begun(spec)
        return spec

    def _begun(self, spec: TrialSpec) -> Entry:
        """A trial that runs, in the storage."""
        baseline = spec.phase == "baseline"
        study = self._baselines if baseline else self.searched
        params = {} if baseline else {BETA_KL: spec.beta_kl, KL_TEMPERATURE: spec.kl_temperature}
        running = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions={name: self._space[name] for name in params},
            user_attrs={"trial_id": spec.trial_id, "phase": spec.phase, "seed": spec.seed},
        )
        study_id = self._storage.get_study_id_from_name(study.study_name)
        storage_id = self._storage.create_new_trial(study_id, template_trial=running)
        return Entry(spec, optuna.Trial(study, storage_id), storage_id, None, settled=False)

    def again(self, entry: Entry) -> TrialSpec:
        """Record a trial that has ended as running once more, under its own id; what it was stays in the storage."""
        spec = entry.spec
        self.entries[spec.trial_id] = self._begun(spec)
        return spec

    def record(self, entry: Entry, outcome: TrialOutcome) -> None:
        """Keep the outcome of a trial; it survives from here on, though Optuna's model does not see it yet."""
        entry.trial.set_user_attr("outcome", asdict(outcome))
        entry.outcome = outcome

    def settle(self, entry: Entry, constraint: float | None) -> None:
        """Tell Optuna the end of a trial that has an outcome.

        Args:
            constraint: `reroute_regression`, or for a stopped trial what it is taken to be; a searched trial without
                it cannot count as complete, since Optuna would take it for feasible, and is told as failed.
        """
        assert entry.outcome is not None
        # All before the tell, after which a trial takes no attribute. A sweep killed on the way writes them again.
        completed = entry.outcome.status == "completed"
        metrics = asdict(entry.outcome) | entry.outcome.metrics | {CONSTRAINT: constraint if completed else None}
        show_metrics(self._storage, entry.storage_id, metrics)
        if constraint is not None:
            show_constraint(self._storage, entry.storage_id, constraint)
            # Optuna warns where a constraint is set twice.
            if CONSTRAINT not in self._storage.get_trial(entry.storage_id).constraints:
                entry.trial.set_constraint(CONSTRAINT, constraint)
        if completed and (entry.spec.phase == "baseline" or constraint is not None):
            assert entry.outcome.eval_benign_kl is not None
            entry.trial.study.tell(entry.trial, math.log(max(entry.outcome.eval_benign_kl, MIN_DRIFT)))
        else:
            state = TrialState.PRUNED if entry.outcome.status == "stopped" else TrialState.FAIL
            entry.trial.study.tell(entry.trial, state=state)
        entry.settled = True

    def numbers(self) -> dict[str, int]:
        """The searched trials' numbers in their study, by which Optuna's tools name them, by trial id."""
        searched = [entry for entry in self.entries.values() if entry.spec.phase != "baseline"]
        return {each.spec.trial_id: self._storage.get_trial_number_from_id(each.storage_id) for each in searched}

    def note(self, headline: str, text: str) -> None:
        """Keep a verdict, and a text (Markdown) on it, that the Optuna dashboard shows beside the searched trials."""
        self.searched.set_user_attr(VERDICT, headline)
        write_note(self._storage, self._storage.get_study_id_from_name(STUDY_NAME), text)

    def _read(self, study: optuna.Study) -> list[Entry]:
        """The trials of this sweep in `study`; what another tool added to it has no id of ours and is left out."""
        study_id = self._storage.get_study_id_from_name(study.study_name)
        entries = []
        for frozen in study.get_trials(deepcopy=False):
            attrs = frozen.user_attrs
            if "trial_id" not in attrs:
                continue
            beta_kl, kl_temperature = frozen.params.get(BETA_KL, 0.0), frozen.params.get(KL_TEMPERATURE, 1.0)
            spec = TrialSpec(attrs["trial_id"], attrs["phase"], beta_kl, kl_temperature, attrs["seed"])
            outcome = TrialOutcome(**attrs["outcome"]) if "outcome" in attrs else None
            storage_id = self._storage.get_trial_id_from_study_id_trial_number(study_id, frozen.number)
            trial = optuna.Trial(study, storage_id)
            entries.append(Entry(spec, trial, storage_id, outcome, frozen.state.is_finished()))
        return entries


def _open_study(storage: BaseStorage, name: str) -> optuna.Study:
    """The study of that name, made if there is none. Its sampler is never asked: `sweeps.plan.sampler` suggests."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(
        study_name=name, storage=storage, direction="minimize", sampler=sampler, load_if_exists=True
    )
    introduce(storage, storage.get_study_id_from_name(name))
    return study


def trial_config(config: CircuitBreakerConfig, spec: TrialSpec) -> CircuitBreakerConfig:
    """What one trial trains, of a sweep's configuration."""
    return replace(config, beta_kl=spec.beta_kl, kl_temperature=spec.kl_temperature, seed=spec.seed)
