"""What the measured models of a sweep write on held-out prompts: `trials/<id>/behaviour.json`, read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cbtrain.config.validation import from_json
from cbtrain.utils.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Answers:
    """What a model makes of one kind of prompt, as shares of the prompts."""

    unchanged: float | None
    """The same text as before training; None for the model before training."""
    refused: float
    degenerate: float
    complied: float | None
    """Coherent answers; None in files of older versions."""


@dataclass(frozen=True)
class Behaviour:
    """One model's answers. `beta_kl` and `kl_temperature` are None before training."""

    beta_kl: float | None
    kl_temperature: float | None
    prompts: int
    """Of each kind, the larger number."""
    harmful_prompts: int
    benign_prompts: int
    harmful: Answers
    benign: Answers
    trial_id: str
    """Empty before training."""
    prefilled_nll: float | None
    """Of harmful completions once their first tokens are given, nats per token; None where all are shorter."""
    prefilled: Answers | None = None
    """Answers to harmful prompts of which the first tokens are given; None where that was not measured."""


@dataclass(frozen=True)
class _Rate:
    teacher: float
    student: float


@dataclass(frozen=True)
class _Kind:
    prompts: int
    unchanged_rate: float
    refusal_rate: _Rate
    degenerate_rate: _Rate
    complied_rate: _Rate | None = None


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
    harmful_prefilled: _Kind | None = None


def load_behaviour(run_dir: str | Path, trials: "pd.DataFrame") -> list[Behaviour]:
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
        except (InputError, ValueError, TypeError, AttributeError):
            raise InputError(f"{path}: not what `cbtrain.evaluate` writes: remove it, or measure again") from None
        if not found:
            found.append(_of(record, "teacher", None, None, ""))
        setting = float(trial.beta_kl), float(trial.kl_temperature)
        found.append(_of(record, "student", *setting, str(trial.trial_id)))  # type: ignore[arg-type]
    return found


def _in_present_words(text: str) -> str:
    """The file as schema version 3 has it. Version 1 says `base` for the teacher and `tuned` for the student; both
    earlier ones tell gibberish from empty answers."""
    record = json.loads(text.replace('"base":', '"teacher":').replace('"tuned":', '"student":'))
    for kind in ("harmful", "benign"):
        rates = record.get(kind, {}) if isinstance(record, dict) else {}
        if "gibberish_rate" in rates:
            empty = rates.get("empty_rate", {})
            rates["degenerate_rate"] = {
                view: share + empty.get(view, 0.0) for view, share in rates["gibberish_rate"].items()
            }
    return json.dumps(record)


def _of(
    record: _Record, view: Literal["teacher", "student"], beta_kl: float | None, heat: float | None, trial_id: str
) -> Behaviour:
    def answers(kind: _Kind) -> Answers:
        unchanged = kind.unchanged_rate if view == "student" else None
        complied = None if kind.complied_rate is None else getattr(kind.complied_rate, view)
        return Answers(unchanged, getattr(kind.refusal_rate, view), getattr(kind.degenerate_rate, view), complied)

    return Behaviour(
        beta_kl=beta_kl,
        kl_temperature=heat,
        prompts=max(record.harmful.prompts, record.benign.prompts),
        harmful_prompts=record.harmful.prompts,
        benign_prompts=record.benign.prompts,
        harmful=answers(record.harmful),
        benign=answers(record.benign),
        trial_id=trial_id,
        prefilled_nll=getattr(record.prefill.nll, view),
        prefilled=answers(record.harmful_prefilled) if record.harmful_prefilled else None,
    )
