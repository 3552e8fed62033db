"""The verdict between settings that were assessed: the pick, that none qualifies, or that none of them behaves."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from analysis.behaviour.judge import MOST_SETTINGS
from analysis.constraint import fails_often
from analysis.decision import Baseline, Decision, Needed, SettingAssessment
from analysis.formatting import count, number, percent, setting, signed, temperature, with_relation
from analysis.noise import is_noisy
from analysis.rules_of_thumb import Outlook, evaluate_rules, with_reasons
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.search_space import BETA_KL_RANGE, RangeEnd, SearchSpace
from analysis.surrogate.surrogate import Surrogate

NEARLY = 0.05
"""Of P below the confidence: a setting that much short of it is named where it drifts less."""


def between_settings(
    decision: Decision, baseline: Baseline, model: Surrogate, usable: pd.DataFrame, trained: Mapping[str, Any]
) -> Decision:
    """The verdict between the settings that ran; `decision` is the one without enough evidence."""
    settings, confidence, searched = decision.settings, decision.confidence, decision.searched
    candidates = pick_candidates(decision.settings)
    pick = candidates[0] if candidates else None
    near = pick.beta_kl if pick else None
    outlooks = _outlook(model, 0.3, searched), _outlook(model, 0.5, searched)
    rules = evaluate_rules(usable, near, *outlooks, confidence)
    decision = replace(decision, rules_of_thumb=rules)
    if pick is not None:
        cost = f"{signed(pick.reroute_delta)} of {number(decision.tolerance or 0, 2)} allowed"
        chosen = Outlook(pick.beta_kl, pick.probability_feasible, pick.drift)
        decision = replace(decision, rules_of_thumb=with_reasons(rules, chosen, cost, *outlooks))
        return _chosen(decision, pick, baseline)
    if settings[0].qualifies:
        return _none_behaves(decision, trained)
    on_map = model.probability_feasible(coordinates(*searched.grid(), searched))
    if max(on_map.max(), settings[0].probability_feasible) < 1 - confidence:
        return _none_qualifies(decision, baseline)
    return decision


def nearly_chosen(decision: Decision) -> SettingAssessment | None:
    """The setting with the least drift of those that drift less than the pick and are just not sure enough."""
    near = [
        each
        for each in decision.settings
        if not each.qualifies
        and not each.complaints
        and each.n_failed < each.n_seeds
        and decision.confidence - NEARLY <= each.probability_feasible < decision.confidence
        and each.drift < (decision.eval_benign_kl or 0)
    ]
    return min(near, key=lambda each: each.drift, default=None)


def pick_candidates(settings: Sequence[SettingAssessment]) -> tuple[SettingAssessment, ...]:
    """The settings that qualify and of which nothing says that they do not hold, least drift first.

    The first is the pick, the others are what to step down to; none where so many were measured and failed that no
    other is worth its cost.
    """
    out = out_by_behaviour(settings)
    return tuple(each for each, is_out in zip(settings, out, strict=True) if each.qualifies and not is_out)


def out_by_behaviour(settings: Sequence[SettingAssessment]) -> list[bool]:
    """Which settings do what they may not; of the others also those unmeasured where so many measured ones did."""
    failed = sum(bool(each.qualifies and each.measured and each.complaints) for each in settings)
    return [bool(each.complaints) or (failed >= MOST_SETTINGS and not each.measured) for each in settings]


def _outlook(model: Surrogate, beta_kl: float, searched: SearchSpace) -> Outlook | str:
    """What the model says of a weight at T = 1, whether it ran or not; where it was not searched, that."""
    if not searched.contains(beta_kl, 1.0):
        return f"({number(beta_kl)}, T 1) is not searched"
    point = coordinates(beta_kl, 1.0, searched)
    drift = math.exp(model.drift.value(point).expectation()[0])
    return Outlook(beta_kl, float(model.probability_feasible(point)[0]), drift)


def _chosen(decision: Decision, pick: SettingAssessment, baseline: Baseline) -> Decision:
    warnings = list(decision.warnings)
    passed_over = [each for each in decision.settings if each.qualifies and each.complaints and each.drift < pick.drift]
    for each in passed_over:
        named = setting(each.beta_kl, each.kl_temperature)
        warnings.append(f"{named} drifts less and was passed over: {', '.join(each.complaints)}.")
    for each in decision.settings:
        if fails_often(each.n_failed, each.n_seeds) and each.drift < pick.drift:
            named = setting(each.beta_kl, each.kl_temperature)
            warnings.append(f"{named} was passed over: {each.n_failed} of {count(each.n_seeds, 'seed')} failed there.")
    if None in (pick.harmful_nll, baseline.harmful_nll, baseline.base_harmful_nll):
        warnings.append("Harmful NLL was not recorded: nothing tells whether behaviour agrees with the cosine.")
    if baseline.n_seeds == 1:
        warnings.append("The baseline ran on one seed: how noisy the comparison is comes from the model's prior alone.")
    kept = pick.drift / baseline.drift
    if kept >= 1:
        warnings.append("KL does not lower benign drift here: beta_kl = 0 serves as well.")
    ran = [(each.beta_kl, each.kl_temperature) for each in decision.settings]
    ends = decision.searched.ends_at((pick.beta_kl, pick.kl_temperature), ran) if kept < 1 else []
    at_ends = " ".join(f"The pick sits at {decision.searched.says(end)}" for end in ends)
    warnings += [at_ends] if at_ends else []
    qualified = sum(each.qualifies for each in decision.settings)
    least = "this one has the least benign drift" + (" of those that behave" if passed_over else "")
    return replace(
        decision,
        verdict="choose",
        reason=f"Of {count(len(decision.settings), 'setting')} that ran, {qualified} stayed within the limit at "
        f"P ≥ {number(decision.confidence)}; {least}.",
        beta_kl=pick.beta_kl,
        kl_temperature=pick.kl_temperature,
        probability_feasible=pick.probability_feasible,
        eval_benign_kl=pick.drift,
        drift_kept=kept,
        drift_reduction_vs_baseline=1 - kept,
        reroute_delta=pick.reroute_delta,
        reroute_delta_interval=pick.reroute_delta_interval,
        reroute_delta_bound=pick.reroute_delta_bound,
        n_seeds=pick.n_seeds,
        n_sound_seeds=pick.n_seeds - pick.n_failed,
        confirmed=pick.n_seeds - pick.n_failed >= 3,
        behaviour_warning=pick.behaviour_reservation,
        warnings=tuple(warnings),
        range_warning=at_ends,
        wider=decision.searched.widened(ends) if ends else None,
        needed=None,
    )


def _none_qualifies(decision: Decision, baseline: Baseline) -> Decision:
    searched, below, further = decision.searched, RangeEnd("beta_kl", "lower"), ""
    (low, high), heat = searched.beta_kl, searched.range_of("kl_temperature")
    if low > BETA_KL_RANGE[0]:
        further = f"None qualifies down to {searched.says(below)}"
    lost = _lost_at_the_least_weight(decision)
    return replace(
        decision,
        verdict="no_candidate_qualifies",
        reason=f"Every beta_kl from {low:g} to {high:g} costs more rerouting than the limit allows, at kl_temperature "
        f"{heat}. Without KL benign drift is {number(baseline.drift)} nats/token.",
        range_warning=further,
        warnings=(*decision.warnings, *([further] if further else []), *([lost] if lost else [])),
        wider=searched.widened([below]) if further else None,
        beta_kl=0.0,
        kl_temperature=1.0,
        probability_feasible=1.0,
        eval_benign_kl=baseline.drift,
        drift_kept=1.0,
        drift_reduction_vs_baseline=0.0,
        reroute_delta=0.0,
        reroute_delta_interval=(0.0, 0.0),
        reroute_delta_bound=0.0,
        n_seeds=baseline.n_seeds,
        n_sound_seeds=baseline.n_seeds,
        confirmed=baseline.n_seeds >= 3,
        needed=None,
    )


def _lost_at_the_least_weight(decision: Decision) -> str:
    """That even next to no KL costs what much KL costs, which is not KL's doing; empty where it is not so."""
    low = min(decision.settings, key=lambda each: each.beta_kl)
    above = [each.reroute_delta for each in decision.settings if 3 <= each.beta_kl / low.beta_kl <= 30]
    if low.beta_kl > 0.01 or not above or low.reroute_delta < max(0.8 * max(above), decision.tolerance or 0):
        return ""
    return (
        f"Even beta_kl {number(low.beta_kl)} loses {signed(low.reroute_delta)}, about as much as ten times it, though "
        f"the cost of KL vanishes with its weight. Something else tells these trials from the baseline: see their logs."
    )


def _none_behaves(decision: Decision, trained: Mapping[str, Any]) -> Decision:
    """Every setting that keeps the limit does something to what the model writes that it may not."""
    failed = [each for each in decision.settings if each.qualifies and each.complaints]
    named = "; ".join(f"{setting(each.beta_kl, each.kl_temperature)}: {', '.join(each.complaints)}" for each in failed)
    harmful = [each for each in failed if any("harmful" in said for said in each.complaints)]
    benign = [each for each in failed if any("benign" in said for said in each.complaints)]
    mend: dict[str, Any] = {}
    help_with = "With smaller weights less of the harmful answers returns: --beta-kl-range."
    if benign and trained.get("retain_norm", "absolute") == "relative":
        mend = {"retain_scale": float(f"{3 * float(trained.get('retain_scale', 10.0)):.2g}")}
        help_with = f"Benign text needs more hold: --retain-scale {mend['retain_scale']:g}."
    elif benign:
        mend = {"retain_norm": "relative"}
        help_with = "Benign text needs more hold: --retain-norm relative, with --retain-scale to set how much."
    if harmful and benign:
        help_with += " Harmful answers returned as well, and less so with smaller weights."
    qualified = [each for each in decision.settings if each.qualifies]
    untried = len(qualified) - len(failed)
    of_those = (
        f"none of the {len(failed)} that were looked at behaves, least drift first" if untried else "none behaves"
    )
    return replace(
        decision,
        verdict="no_setting_behaves",
        reason=f"{count(len(qualified), 'setting')} stayed within the limit, and {of_those}: {named}. {help_with}",
        mend=mend,
        wider=decision.searched.widened([RangeEnd("beta_kl", "lower")]) if harmful and not benign else None,
        needed=None,
    )


def why_insufficient(
    settings: tuple[SettingAssessment, ...], needed: Needed, tolerance: float, confidence: float
) -> str:
    best = settings[0]
    if best.probability_feasible >= confidence:
        return (
            f"No setting qualifies: beta_kl {number(best.beta_kl)} at T {temperature(best.kl_temperature)} comes "
            f"nearest, but {best.n_failed} of {count(best.n_seeds, 'seed')} failed there."
        )
    if best.probability_feasible < 1 - confidence:
        return "Every setting that ran costs more rerouting than the limit allows, but the map holds untried ones."
    if not needed.measured:
        return (
            f"No setting reaches P ≥ {number(confidence)}: fewer than 3 baseline seeds did not fail, too few to tell "
            f"the noise."
        )
    if is_noisy(needed.sigma, tolerance):
        return (
            f"No setting reaches P ≥ {number(confidence)}: seed noise (σ {number(needed.sigma, 2)}) is "
            f"{percent(needed.sigma / tolerance)} of the limit ({number(tolerance, 2)})."
        )
    low, high = best.reroute_delta_interval
    return (
        f"No setting reaches P ≥ {number(confidence)}: beta_kl {number(best.beta_kl)} at T "
        f"{temperature(best.kl_temperature)} comes nearest with {with_relation('P', best.probability_feasible)}, "
        f"{signed(best.reroute_delta)} [{signed(low)}, {signed(high)}] of {number(tolerance, 2)} allowed."
    )
