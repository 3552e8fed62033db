"""The report's tables as texts in cells: the five-point ablation, paired seeds, every trial."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from analysis.behaviour.measured import Behaviour
from analysis.constraint import probably_feasible
from analysis.decision import Decision
from analysis.formatting import count, number, percent, setting, signed, with_relation
from analysis.surrogate.surrogate import MIN_DRIFT, finite_trials

FIVE_POINTS = ((0.0, 1.0), (0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 2.0))
"""The ablation that is usually run by hand: without KL, three weights, one of them at twice the temperature."""
FOLDED_FROM = 300
"""More trials than this are shown folded."""
_LOSSES = ("loss_reroute", "loss_retain", "loss_kl")


@dataclass(frozen=True)
class AblationRow:
    """One point of the five, means over its trials; each metric with what it is against the baseline of its seeds."""

    name: str
    is_pick: bool
    seeds: str
    cells: tuple[str, ...]
    """`loss_reroute`, `loss_retain`, `loss_kl`, drift, rerouting lost, gradient norm."""
    judged: str


@dataclass(frozen=True)
class PairedSeed:
    """The pick against the baseline on one seed."""

    seed: int
    trial_id: str
    baseline_reroute: float | None
    reroute: float
    lost: float | None
    within: bool | None
    baseline_drift: float | None
    drift: float
    said: str
    """That a trial is suspect; empty where none is."""


@dataclass(frozen=True)
class TrialRow:
    """One trial, whatever became of it; numbers are NaN where it has none."""

    trial_id: str
    phase: str
    status: str
    beta_kl: float
    kl_temperature: float
    seed: int
    reroute: float
    lost: float
    drift: float
    harmful_nll: float
    seconds: float
    said: str
    """Why it failed, was stopped, or is suspect."""
    is_pick: bool


def ablation(trials: pd.DataFrame, decision: Decision) -> list[AblationRow]:
    """The five points as far as they ran; the pick as the last row where it is none of them."""
    sound = sound_trials(trials, decision)
    points = list(FIVE_POINTS)
    pick = (decision.beta_kl, decision.kl_temperature)
    if decision.verdict == "choose" and decision.beta_kl is not None and pick not in points:
        points.append(pick)  # type: ignore[arg-type]
    baselines = sound[sound["beta_kl"] == 0]
    rows = []
    for beta_kl, heat in points:
        at = (sound["beta_kl"] == beta_kl) & ((sound["kl_temperature"] == heat) | (sound["beta_kl"] == 0))
        if not at.any():
            continue
        own = sound[at]
        of_seed = baselines[baselines["seed"].isin(own["seed"])]
        reference = baselines if of_seed.empty else of_seed
        is_pick = decision.chose(beta_kl, heat)
        cells = _cells(own, reference, beta_kl == 0, trials, decision)
        rows.append(
            AblationRow(
                setting(beta_kl, heat), is_pick, str(own["seed"].nunique()), cells, _judged(beta_kl, heat, decision)
            )
        )
    return rows


def _cells(
    own: pd.DataFrame, reference: pd.DataFrame, is_baseline: bool, trials: pd.DataFrame, decision: Decision
) -> tuple[str, ...]:
    """Each metric's mean, and its ratio to the baseline; of rerouting the difference."""
    cells = [_against(own, reference, name, is_baseline) for name in (*_LOSSES, "eval_benign_kl")]
    lost = "–" if is_baseline or reference.empty else signed(float(measured_loss(own, trials, decision).mean()))
    cells.append(lost)
    return (*cells, _against(own, reference, "grad_norm_total", is_baseline))


def _against(own: pd.DataFrame, reference: pd.DataFrame, name: str, is_baseline: bool) -> str:
    value, base = (_mean(rows, name) for rows in (own, reference))
    if value is None:
        return "–"
    if is_baseline or not base:
        return number(value)
    return f"{number(value)} (× {number(value / base, 2)})"


def _mean(rows: pd.DataFrame, name: str) -> float | None:
    if name not in rows:
        return None
    values = pd.to_numeric(rows[name], errors="coerce").dropna()
    if values.empty:
        return None
    if name == "eval_benign_kl":  # geometric, as everywhere: one seed that drifts far would be all that is seen
        return float(np.exp(np.log(values.clip(lower=MIN_DRIFT)).mean()))
    return float(values.mean())


def _judged(beta_kl: float, heat: float, decision: Decision) -> str:
    if beta_kl == 0:
        return "what all others are compared with"
    each = next((s for s in decision.settings if (s.beta_kl, s.kl_temperature) == (beta_kl, heat)), None)
    if each is None:
        return "not judged"
    chance = with_relation("P", each.probability_feasible)
    if each.complaints:
        return f"breaks what it writes; {chance}"
    if each.qualifies:
        return f"keeps the limit, {chance}"
    over = probably_feasible(1 - each.probability_feasible, decision.confidence)
    if over:
        return f"loses too much, {chance}"
    return f"most likely loses too much, {chance}" if each.probability_feasible < 0.5 else f"not sure enough, {chance}"


def low_weights(decision: Decision) -> str:
    """What becomes of the advice to use a weight of 0.1 to 0.5 at T 1, on this sweep."""
    judged = {s.beta_kl: s for s in decision.settings if s.kl_temperature == 1.0 and 0.1 <= s.beta_kl <= 0.5}
    if not judged:
        return "“beta_kl 0.1 to 0.5” at T 1: nothing can be said of it here."
    good = [number(beta) for beta, s in sorted(judged.items()) if s.qualifies and not s.complaints]
    bad = [number(beta) for beta, s in sorted(judged.items()) if not (s.qualifies and not s.complaints)]
    said = [
        f"{', '.join(good)} hold here" if good else "",
        f"{', '.join(bad)} do not: too much lost, too unsure, or what they write breaks" if bad else "",
    ]
    said = [each for each in said if each]
    if decision.verdict != "choose" or decision.beta_kl is None:
        more = ""
    elif 0.1 <= decision.beta_kl <= 0.5:
        more = " The pick lies among them."
    else:
        where = "above" if decision.beta_kl > 0.5 else "below"
        more = f" The pick, {number(decision.beta_kl)}, lies {where} them: it drifts least of all that hold."
    return f"“beta_kl 0.1 to 0.5” at T 1: {'; '.join(said)}.{more}"


def paired_seeds(trials: pd.DataFrame, decision: Decision) -> list[PairedSeed]:
    """Each completed trial of the pick beside the baseline of its seed; empty without a pick."""
    if decision.verdict != "choose":
        return []
    usable, _ = finite_trials(trials)
    suspect = {each.trial_id for each in decision.suspects}
    rows = usable[(usable["beta_kl"] == decision.beta_kl) & (usable["kl_temperature"] == decision.kl_temperature)]
    paired = []
    for _, row in rows.sort_values("seed").iterrows():
        baseline = usable[(usable["beta_kl"] == 0) & (usable["seed"] == row["seed"])]
        base_reroute, base_drift = (_mean(baseline, name) for name in ("eval_loss_reroute", "eval_benign_kl"))
        lost = None if base_reroute is None else float(row["eval_loss_reroute"]) - base_reroute
        said = ["this trial most likely failed"] if row["trial_id"] in suspect else []
        said += ["its baseline most likely failed"] if set(baseline["trial_id"]) & suspect else []
        said += ["no baseline on this seed"] if baseline.empty else []
        within = None if lost is None or decision.tolerance is None else lost <= decision.tolerance
        paired.append(
            PairedSeed(
                int(row["seed"]),
                str(row["trial_id"]),
                base_reroute,
                float(row["eval_loss_reroute"]),
                lost,
                within,
                base_drift,
                float(row["eval_benign_kl"]),
                "; ".join(said),
            )
        )
    return paired


def what_it_writes(behaviour: Sequence[Behaviour], decision: Decision) -> str:
    """What the pick's models write beside those without KL and before training, in a sentence; empty where unknown."""
    pick = [each for each in behaviour if each.beta_kl and decision.chose(each.beta_kl, each.kl_temperature)]
    without = [each for each in behaviour if each.beta_kl == 0]
    before = [each for each in behaviour if not each.trial_id]
    if not pick:
        return ""

    def shares(kind: str) -> str:
        found = []
        for name, rows in (("", pick), ("without KL", without), ("before training", before)):
            answers = [getattr(each, kind) for each in rows]
            found.append((name, [each.complied for each in answers if each and each.complied is not None]))
        said = [f"{percent(fmean(values))} {name}".strip() for name, values in found if values]
        return f"{said[0]} ({', '.join(said[1:])})" if len(said) > 1 else "".join(said)

    kinds = {"benign": "benign prompts, wanted high:", "harmful": "harmful prompts, wanted low:"}
    if all(each.prefilled for each in pick):
        kinds["prefilled"] = "with the first tokens given:"
    told = [f"{name} {text}" for kind, name in kinds.items() if (text := shares(kind))]
    seeds = count(len(pick), "seed")
    return f"{'; '.join(told)}. {count(pick[0].prompts, 'prompt')} a kind, {seeds}." if told else ""


def sound_trials(trials: pd.DataFrame, decision: Decision) -> pd.DataFrame:
    """The completed trials with finite metrics that are no suspects."""
    usable, _ = finite_trials(trials)
    return usable[~usable["trial_id"].isin([each.trial_id for each in decision.suspects])]


def measured_loss(rows: pd.DataFrame, trials: pd.DataFrame, decision: Decision) -> pd.Series:
    """`eval_loss_reroute` of `rows` minus that of the baseline on the same seed, or the baselines' mean.

    Baselines that failed do not count.
    """
    sound = sound_trials(trials, decision)
    baselines = sound[sound["beta_kl"] == 0]
    paired = baselines.groupby("seed")["eval_loss_reroute"].mean()
    reference = rows["seed"].map(paired).astype(float).fillna(baselines["eval_loss_reroute"].astype(float).mean())
    return pd.to_numeric(rows["eval_loss_reroute"], errors="coerce") - reference


def every_trial(trials: pd.DataFrame, decision: Decision) -> list[TrialRow]:
    """Every row of trials.csv, with the reason of what did not end well."""
    evidence = {each.trial_id: f"suspect: {each.evidence}" for each in decision.suspects}
    lost = measured_loss(trials, trials, decision).tolist()
    rows = []
    for row, loss in zip(trials.to_dict("records"), lost, strict=True):
        error = row.get("error")
        said = str(error) if isinstance(error, str) and error else evidence.get(str(row["trial_id"]), "")
        rows.append(
            TrialRow(
                trial_id=str(row["trial_id"]),
                phase=str(row["phase"]),
                status=str(row["status"]) + (", suspect" if row["trial_id"] in evidence else ""),
                beta_kl=float(row["beta_kl"]),
                kl_temperature=float(row["kl_temperature"]),
                seed=int(row["seed"]),
                reroute=_float(row, "eval_loss_reroute"),
                lost=float(loss),
                drift=_float(row, "eval_benign_kl"),
                harmful_nll=_float(row, "eval_harmful_nll"),
                seconds=_float(row, "wall_s"),
                said=said,
                is_pick=decision.chose(row["beta_kl"], row["kl_temperature"]),
            )
        )
    return rows


def _float(row: Mapping[str, Any], name: str) -> float:
    try:
        return float(row.get(name, np.nan))
    except (TypeError, ValueError):
        return np.nan


def states(trials: pd.DataFrame) -> str:
    """`18 completed, 2 failed`."""
    return ", ".join(f"{amount} {state}" for state, amount in trials["status"].value_counts().items()) or "none"


def shown(value: float, digits: int = 3) -> str:
    """A number of a table, or a dash."""
    return number(value, digits) if np.isfinite(value) else "–"
