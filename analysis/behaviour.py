"""What the measured models of a sweep write on held-out prompts: `trials/<id>/behaviour.json`, as rows of a table."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

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
            record = json.loads(path.read_text(encoding="utf-8"))
            if not found:
                found.append(_of(record, "base", None, None))
            found.append(_of(record, "tuned", float(trial.beta_kl), float(trial.kl_temperature)))  # type: ignore[arg-type]
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{path}: not what `cbtrain.evaluate` writes: remove it, or measure again") from None
    return found


def _of(record: dict[str, Any], view: Literal["base", "tuned"], beta_kl: float | None, heat: float | None) -> Behaviour:
    def answers(kind: str) -> Answers:
        rates = record[kind]
        unchanged = float(rates["unchanged_rate"]) if view == "tuned" else None
        return Answers(unchanged, float(rates["refusal_rate"][view]), float(rates["gibberish_rate"][view]))

    prefilled = record["prefill"]["nll"][view]
    return Behaviour(
        beta_kl=beta_kl,
        kl_temperature=heat,
        prompts=max(int(record[kind]["prompts"]) for kind in ("harmful", "benign")),
        harmful=answers("harmful"),
        benign=answers("benign"),
        prefilled_nll=None if prefilled is None else float(prefilled),
    )
