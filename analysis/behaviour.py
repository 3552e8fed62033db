"""What the measured models of a sweep write on held-out prompts: `trials/<id>/behaviour.json`, as rows of a table."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pandas as pd

from cbtrain.config.validation import from_json
from cbtrain.utils.errors import InputError


@dataclass(frozen=True)
class Answers:
    """What a model makes of one kind of prompt, as shares of the prompts."""

    unchanged: float | None
    """The same text as before training; None for the model before training."""
    refused: float
    gibberish: float


@dataclass(frozen=True)
class Behaviour:
    """One model's answers. `beta_kl` and `kl_temperature` are None before training."""

    beta_kl: float | None
    kl_temperature: float | None
    prompts: int
    """Of each kind, the larger number."""
    harmful: Answers
    benign: Answers
    prefilled_nll: float | None
    """Of harmful completions once their first tokens are given, nats per token; None where all are shorter."""


@dataclass(frozen=True)
class _Rate:
    teacher: float
    student: float


@dataclass(frozen=True)
class _Kind:
    prompts: int
    unchanged_rate: float
    refusal_rate: _Rate
    gibberish_rate: _Rate


@dataclass(frozen=True)
class _Nll:
    teacher: float | None
    student: float | None


@dataclass(frozen=True)
class _Prefill:
    nll: _Nll


@dataclass(frozen=True)
class _Record:
    """What is read of a behaviour.json."""

    harmful: _Kind
    benign: _Kind
    prefill: _Prefill


def load_behaviour(run_dir: str | Path, trials: pd.DataFrame) -> list[Behaviour]:
    """The model before training, then every measured trial in the order of `trials`; empty where none was measured.

    Raises:
        InputError: a file that does not hold what `cbtrain.evaluation.behaviour` writes.
    """
    found: list[Behaviour] = []
    for trial in trials.itertuples():
        path = Path(run_dir) / "trials" / str(trial.trial_id) / "behaviour.json"
        if not path.is_file():
            continue
        try:
            record = from_json(_in_present_words(path.read_text(encoding="utf-8")), _Record)
        except (InputError, UnicodeDecodeError):
            raise InputError(f"{path}: not what `cbtrain.evaluate` writes: remove it, or measure again") from None
        if not found:
            found.append(_of(record, "teacher", None, None))
        found.append(_of(record, "student", float(trial.beta_kl), float(trial.kl_temperature)))  # type: ignore[arg-type]
    return found


def _in_present_words(text: str) -> str:
    """The file as schema version 2 has it; version 1 says `base` for the teacher and `tuned` for the student."""
    return text.replace('"base":', '"teacher":').replace('"tuned":', '"student":')


def _of(record: _Record, view: Literal["teacher", "student"], beta_kl: float | None, heat: float | None) -> Behaviour:
    def answers(kind: _Kind) -> Answers:
        unchanged = kind.unchanged_rate if view == "student" else None
        return Answers(unchanged, getattr(kind.refusal_rate, view), getattr(kind.gibberish_rate, view))

    return Behaviour(
        beta_kl=beta_kl,
        kl_temperature=heat,
        prompts=max(record.harmful.prompts, record.benign.prompts),
        harmful=answers(record.harmful),
        benign=answers(record.benign),
        prefilled_nll=getattr(record.prefill.nll, view),
    )
