"""decision.json: the decision with its words, its commands, and all that it rests on.

    python -m analysis.report.record > analysis/report/decision.schema.json

writes the JSON Schema of it, which a test holds against this code.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from pydantic import TypeAdapter

from analysis.behaviour.judge import BehaviourLimits
from analysis.behaviour.measured import Behaviour
from analysis.decision import Decision
from analysis.report.commands import Commands, train_command
from analysis.report.state import last_ended
from analysis.report.wording import explanation, headline
from analysis.surrogate.surrogate import finite_trials, modelled
from cbtrain.utils.files import finite_or_none

SCHEMA_VERSION = 2
"""Of decision.json; rises when a key changes its meaning or goes."""


@dataclass(frozen=True)
class TrialRef:
    """A trial that the decision rests on."""

    trial_id: str
    beta_kl: float
    kl_temperature: float
    seed: int


@dataclass(frozen=True)
class Dates:
    """UTC, ISO 8601; None where the sweep did not write them down."""

    begun: str | None
    last_trial_ended: str | None


@dataclass(frozen=True, kw_only=True)
class DecisionRecord(Decision):
    """Every field of `Decision`, and these."""

    schema_version: int = SCHEMA_VERSION
    sentence: str
    """The report's first line."""
    explanation: str
    train_command: str | None
    """Trains what is recommended; None where nothing is."""
    sweep_command: str | None
    """Sweeps further; None where something is recommended."""
    wider_command: str | None
    trials: dict[str, int]
    """How many, by status."""
    rests_on: tuple[TrialRef, ...]
    """The trials that entered the model and are no suspects."""
    limits: BehaviourLimits
    """What a setting may do to what the model writes."""
    behaviour: tuple[Behaviour, ...]
    """What measured models write, before training first; empty where none was measured."""
    dates: Dates
    preset: str | None
    model: str | None
    inputs: dict[str, Any] = field(default_factory=dict)
    """SHA-256 of the data files and the model's, by path, as the sweep was begun with them."""
    versions: dict[str, Any] | None
    git_commit: str | None


def decision_json(
    decision: Decision,
    sweep: Mapping[str, Any],
    trials: pd.DataFrame,
    behaviour: Sequence[Behaviour],
    commands: Commands,
) -> str:
    """The text of decision.json; every number in it is finite, what is not is null."""
    last = last_ended(trials)
    record = DecisionRecord(
        **{each.name: getattr(decision, each.name) for each in dataclasses.fields(decision)},
        sentence=headline(decision),
        explanation=explanation(decision),
        train_command=train_command(decision, sweep) if commands.trains else None,
        sweep_command=None if commands.trains else commands.next,
        wider_command=commands.wider,
        trials={str(status): int(amount) for status, amount in trials["status"].value_counts().items()},
        rests_on=_rests_on(decision, trials),
        limits=BehaviourLimits.of(sweep.get("flags", {})),
        behaviour=tuple(behaviour),
        dates=Dates(sweep.get("begun_at"), last.isoformat(timespec="seconds") if last else None),
        preset=sweep.get("preset"),
        model=sweep.get("config", {}).get("model"),
        inputs=sweep.get("inputs", {}),
        versions=sweep.get("versions"),
        git_commit=sweep.get("git_commit"),
    )
    first = ("schema_version", "sentence", "explanation")
    values = dataclasses.asdict(record)
    ordered = {name: values[name] for name in first} | values
    return json.dumps(finite_or_none(ordered), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of decision.json."""
    return TypeAdapter(DecisionRecord).json_schema(mode="serialization") | {
        "$schema": "https://json-schema.org/draft/2020-12/schema"
    }


def _rests_on(decision: Decision, trials: pd.DataFrame) -> tuple[TrialRef, ...]:
    suspect = {each.trial_id for each in decision.suspects}
    usable, _ = finite_trials(trials)
    rows = modelled(usable)
    rows = rows[~rows["trial_id"].isin(suspect)]
    return tuple(
        TrialRef(str(row["trial_id"]), float(row["beta_kl"]), float(row["kl_temperature"]), int(row["seed"]))
        for _, row in rows.iterrows()
    )


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
