"""The evidence: benign drift against rerouting lost, every trial and what the model makes of each setting."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.decision import Decision, SettingAssessment
from analysis.formatting import number, percent, setting, signed, temperature, with_relation
from analysis.report.figures.style import Numbers
from analysis.report.tables import measured_loss
from analysis.surrogate.kernel import Array
from analysis.surrogate.surrogate import MIN_DRIFT, finite_trials

ZOOM = 3.0
"""How far the figure goes beyond nothing lost, in units of the limit; what lies further is an arrow at the edge."""
MOST_NOTES = 2
LUCKY = "by luck"


@dataclass(frozen=True)
class Estimate:
    """What the model says of a setting that ran."""

    name: str
    lost: float
    low: float
    high: float
    """95 % interval of what is lost."""
    drift: float
    pareto: bool


@dataclass(frozen=True)
class Note:
    """Why a point that looks better than the pick is not the pick."""

    lost: float
    drift: float
    text: str


@dataclass(frozen=True)
class Evidence:
    """Drift against rerouting lost, a point a completed trial."""

    trial_id: tuple[str, ...]
    setting: tuple[str, ...]
    lost: Array
    """`[n]` `eval_loss_reroute` minus the baseline's of the same seed, or its mean."""
    drift: Array
    """`[n]` `eval_benign_kl`, nats per token."""
    phase: tuple[str, ...]
    of_pick: tuple[bool, ...]
    suspect: tuple[bool, ...]
    tolerance: float | None
    """The allowed loss; None without a baseline, when nothing can be compared."""
    pick: Estimate | None
    others: tuple[Estimate, ...]
    notes: tuple[Note, ...]
    baseline_drift: float | None
    """Geometric mean of the baselines that did not fail."""


def prepare_evidence(trials: pd.DataFrame, decision: Decision) -> Evidence:
    """Trials as drift against rerouting lost; empty without a baseline."""
    usable, _ = finite_trials(trials)
    suspect = {each.trial_id for each in decision.suspects}
    baselines = usable[(usable["beta_kl"] == 0) & ~usable["trial_id"].isin(suspect)]
    if baselines.empty:
        usable = usable.iloc[:0]
    lost = measured_loss(usable, trials, decision).to_numpy(float)
    drift = usable["eval_benign_kl"].to_numpy(float).clip(min=MIN_DRIFT)
    chosen = (decision.beta_kl, decision.kl_temperature) if decision.verdict == "choose" else None
    settings = [*zip(usable["beta_kl"].astype(float), usable["kl_temperature"].astype(float), strict=True)]
    by_setting = {(each.beta_kl, each.kl_temperature): each for each in decision.settings}
    pick = by_setting.get(chosen) if chosen else None  # type: ignore[arg-type]
    others = sorted((each for each in decision.settings if each is not pick), key=lambda each: each.drift)
    return Evidence(
        trial_id=tuple(usable["trial_id"].astype(str)),
        setting=tuple(setting(*each) for each in settings),
        lost=lost,
        drift=drift,
        phase=tuple(usable["phase"]) if "phase" in usable else ("search",) * len(usable),
        of_pick=tuple(each == chosen for each in settings),
        suspect=tuple(each in suspect for each in usable["trial_id"]),
        tolerance=decision.tolerance,
        pick=_estimate(pick) if pick else None,
        others=tuple(_estimate(each) for each in others),
        notes=_notes(decision, pick, settings, lost, drift, usable["trial_id"].isin(suspect)) if pick else (),
        baseline_drift=decision.baseline.drift if decision.baseline else None,
    )


def _estimate(each: SettingAssessment) -> Estimate:
    low, high = each.reroute_delta_interval
    name = f"{number(each.beta_kl)}, T {temperature(each.kl_temperature)}"
    return Estimate(name, each.reroute_delta, low, high, each.drift, each.pareto)


def _notes(
    decision: Decision,
    pick: SettingAssessment,
    settings: list[tuple[float, float]],
    lost: Array,
    drift: Array,
    failed: pd.Series,
) -> tuple[Note, ...]:
    """The settings that look better than the pick, with what speaks against them; then the nearest of less drift."""
    table = pd.DataFrame({"setting": settings, "lost": lost, "drift": np.log(drift)})[~failed.to_numpy()]
    measured = {
        at: (float(rows["lost"].mean()), float(np.exp(rows["drift"].mean()))) for at, rows in table.groupby("setting")
    }
    own = measured.get((pick.beta_kl, pick.kl_temperature), (0.0, pick.drift))[1]
    notes: list[Note] = []
    beyond: list[Note] = []
    for each in decision.settings:
        at = measured.get((each.beta_kl, each.kl_temperature))
        if each is pick or at is None or at[1] >= own:
            continue
        within = at[0] <= (decision.tolerance or 0)
        note = Note(*at, f"{number(each.beta_kl)}, T {temperature(each.kl_temperature)}:\n{_against(each, decision)}")
        (notes if within else beyond).append(note)
    # What speaks against a setting comes first: that a trial was lucky is the rule among many alike.
    notes.sort(key=lambda note: (LUCKY in note.text, note.drift))
    beyond.sort(key=lambda note: note.lost)
    return tuple([*notes[:MOST_NOTES], *beyond[:1]][:MOST_NOTES])


def _against(each: SettingAssessment, decision: Decision) -> str:
    if each.complaints:
        return "breaks what it writes"
    if each.n_failed:
        return f"{each.n_failed} of {each.n_seeds} seeds failed"
    if not each.qualifies:
        chance = with_relation("P", each.probability_feasible)
        return f"{chance}, too unsure" if each.probability_feasible > 0.5 else chance
    if each.drift < (decision.eval_benign_kl or 0):
        return "others like it break what they write"
    return f"{LUCKY}: model says {number(each.drift)}"


def numbers_of_evidence(data: Evidence) -> Numbers:
    """Every point, the model's value of the pick first."""
    rows = []
    if data.pick is not None:
        rows.append(("model", f"pick: {data.pick.name}", signed(data.pick.lost), number(data.pick.drift), "the pick"))
    for i, trial_id in enumerate(data.trial_id):
        marks = ["suspect"] if data.suspect[i] else []
        marks += ["a seed of the pick"] if data.of_pick[i] else []
        row = trial_id, data.setting[i], signed(data.lost[i]), number(data.drift[i]), ", ".join([data.phase[i], *marks])
        rows.append(row)
    return Numbers(("trial", "setting", "rerouting lost", "drift, nats/token", "what it is"), tuple(rows))


def describe_evidence(data: Evidence) -> str:
    if data.tolerance is None or not len(data.lost):
        return "No completed baseline to compare with."
    over = int((data.lost > data.tolerance).sum())
    said = f"{len(data.lost)} completed trials; {over} lost more than the limit of {number(data.tolerance, 2)}."
    if data.pick is not None:
        kept = percent(data.pick.drift / data.baseline_drift) if data.baseline_drift else "?"
        said += (
            f" The pick, {data.pick.name}, loses {signed(data.pick.lost)} and drifts by {number(data.pick.drift)}, "
            f"{kept} of what is drifted without KL."
        )
    return said
