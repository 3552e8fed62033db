"""What the Optuna dashboard shows of a journal beside what Optuna itself keeps there: limit, columns, name and note.

`pip install optuna-dashboard`, then `optuna-dashboard RUN/study.log`. Everything here is for the eye and is never read
back. It is written by Optuna's storage alone, so that a sweep needs no dashboard; the attributes' names and forms are
those of optuna-dashboard 0.21, which is the newest.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.storages import BaseStorage

from analysis.columns import METRIC_COLUMNS
from analysis.decision import Decision
from analysis.formatting import number
from analysis.report import wording

METRIC_NAME = "ln benign drift (nats/token)"
BEST_TRIAL = "Best Trial"
MEANING = "has the least drift, within the limit or not (over it: grey)"
"""Stands in the table of attributes beside the card that it speaks of, whose choice knows no limit."""
VERDICT = "verdict"
NOTE_PART = 2045
"""Characters in one attribute of a note."""
_METRIC_NAMES, _CONSTRAINTS = "study:metric_names", "constraints"
_NOTE_VERSION, _NOTE_TEXT = "dashboard:note_ver", "dashboard:note_str:"


def introduce(storage: BaseStorage, study_id: int) -> None:
    """Say of a study, once, what it minimises and what the dashboard's card of the best trial means.

    `Study.set_metric_names` writes the same name, and warns that it is experimental.
    """
    if _METRIC_NAMES not in storage.get_study_system_attrs(study_id):
        storage.set_study_system_attr(study_id, _METRIC_NAMES, [METRIC_NAME])
    if BEST_TRIAL not in storage.get_study_user_attrs(study_id):
        storage.set_study_user_attr(study_id, BEST_TRIAL, MEANING)


def show_constraint(storage: BaseStorage, trial_id: int, constraint: float) -> None:
    """Have the plots draw a trial over the limit grey: they read Optuna 4's list, not what `set_constraint` writes.

    Optuna 5 reads the list as a second constraint of the same value, which changes no order of trials.
    """
    storage.set_trial_system_attr(trial_id, _CONSTRAINTS, [constraint])


def show_metrics(storage: BaseStorage, trial_id: int, metrics: Mapping[str, object]) -> None:
    """Give a trial an attribute a metric, by which the dashboard's table sorts.

    Args:
        metrics: by column of trials.csv. `METRIC_COLUMNS` and `reroute_regression` of them are shown, where finite.
    """
    for name in (*METRIC_COLUMNS, "reroute_regression"):
        value = metrics.get(name)
        if isinstance(value, int | float) and math.isfinite(value):
            storage.set_trial_user_attr(trial_id, name, value)


def write_note(storage: BaseStorage, study_id: int, text: str) -> None:
    """Make a text (Markdown) the note of a study, in place of an earlier one."""
    attrs = storage.get_study_system_attrs(study_id)
    earlier = [attrs[f"{_NOTE_TEXT}{index}"] for index in range(sum(name.startswith(_NOTE_TEXT) for name in attrs))]
    if "".join(earlier) == text:
        return
    storage.set_study_system_attr(study_id, _NOTE_VERSION, attrs.get(_NOTE_VERSION, 0) + 1)
    parts = [text[start : start + NOTE_PART] for start in range(0, len(text), NOTE_PART)]
    for index, part in enumerate([*parts, *[""] * (len(earlier) - len(parts))]):
        storage.set_study_system_attr(study_id, f"{_NOTE_TEXT}{index}", part)


def verdict_note(decision: Decision, rows: Sequence[Mapping[str, Any]], numbers: Mapping[str, int]) -> str:
    """What a decision says, for those who look at its trials in the dashboard.

    Args:
        rows: the trials, with the columns of trials.csv.
        numbers: of the searched trials in their study, by trial id.
    """
    pick = (decision.beta_kl, decision.kl_temperature)
    chosen = [row["trial_id"] for row in rows if (row["beta_kl"], row["kl_temperature"]) == pick]
    named = ", ".join(f"{numbers[trial_id]} ({trial_id})" for trial_id in chosen if trial_id in numbers)
    return "\n".join(
        [
            f"**{wording.headline(decision)}**",
            "",
            wording.explanation(decision),
            *(["", f"Trials of this setting: {named}."] if named else []),
            "",
            f"*{BEST_TRIAL}* of this dashboard {MEANING}.",
            "",
            "Without KL (study `kl_ablation_baseline`: `beta_kl = 0` lies on no logarithmic scale):",
            "",
            "| trial | seed | drift, nats/token | reroute, held out |",
            "|---|---|---|---|",
            *[_baseline_line(row) for row in rows if row["phase"] == "baseline"],
            "",
            "The sweep wrote this when it ended, and writes it anew when it is resumed.",
            "",
        ]
    )


def _baseline_line(row: Mapping[str, Any]) -> str:
    drift, reroute = row["eval_benign_kl"], row["eval_loss_reroute"]
    measured = [row["status"], ""] if drift is None or reroute is None else [number(drift), number(reroute)]
    return f"| {' | '.join([row['trial_id'], str(row['seed']), *measured])} |"
