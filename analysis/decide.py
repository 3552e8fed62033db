"""Which beta_kl to ship, from a sweep's trials: a table in, a `Decision` out. No file, no clock.

Among the settings that were run, the one with the lowest posterior mean drift whose probability of losing at most
`reroute_tolerance` of the baseline's rerouting is at least `confidence`, under the model of `analysis.surrogate`.
Everything is computed from raw metrics, so that tolerance and confidence can be changed after the sweep.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from analysis import baseline as baseline_trials
from analysis.constraint import (
    CONFIDENCE,
    REROUTE_TOLERANCE,
    absolute_tolerance,
    baseline_rerouted,
    fails_often,
    probably_feasible,
)
from analysis.decision import Baseline, Decision, Needed, SettingAssessment
from analysis.formatting import count, number, percent, signed, temperature, with_relation
from analysis.noise import MIN_SEEDS, is_noisy, samples_for, seeds_needed
from analysis.rules_of_thumb import TOO_FEW, Outlook, evaluate_rules
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.search_space import BETA_KL_RANGE, DEFAULT_SPACE, RangeEnd, SearchSpace
from analysis.surrogate.surrogate import MAX_MODELLED, METRICS, Surrogate, finite_trials, modelled
from analysis.suspects import suspects

_REQUIRED = ("beta_kl", "kl_temperature", "seed", "status", *METRICS)


def decide(
    trials: pd.DataFrame,
    *,
    reroute_tolerance: float = REROUTE_TOLERANCE,
    confidence: float = CONFIDENCE,
    searched: SearchSpace = DEFAULT_SPACE,
    draws: int | None = None,
    trained: Mapping[str, Any] = MappingProxyType({}),
) -> Decision:
    """Decide from raw trials (columns of `trials.csv`); only completed ones with finite metrics count.

    Args:
        searched: the ranges that the sweep searched, over which the map goes. Trials outside count as any others.
        draws: hyper-parameter draws to average over at most; None is all that carry weight.
        trained: fields of the trials' configuration, for advice on one that never rerouted.

    Raises:
        ValueError: a column that is needed is missing, or an argument is out of its range.
    """
    _check(trials, reroute_tolerance, confidence)
    usable, warnings = _usable(trials)
    baselines, candidates = usable[usable["beta_kl"] == 0], modelled(usable).query("beta_kl > 0")
    decision = Decision(
        verdict="baseline_failed",
        reason=baseline_trials.why_there_is_none(trials),
        reroute_tolerance=reroute_tolerance,
        confidence=confidence,
        rules_of_thumb=evaluate_rules(usable, None, TOO_FEW, TOO_FEW, confidence),
        n_trials=len(usable),
        warnings=tuple(warnings),
        searched=searched,
    )
    if baselines.empty:
        return decision
    baseline = baseline_trials.summary(baselines, usable)
    tolerance = absolute_tolerance(baselines["eval_loss_reroute"], reroute_tolerance)
    decision = replace(decision, baseline=baseline, tolerance=tolerance)
    often = fails_often(baseline.n_failed, len(baselines))
    if often or not baseline_rerouted(baselines["eval_loss_reroute"]):
        of = baseline_trials.often_failed if often else baseline_trials.never_rerouted
        reason, mend = of(baselines, trained)
        return replace(decision, verdict="baseline_never_rerouted", reason=reason, mend=mend)
    model = Surrogate.of(trials, reroute_tolerance, draws, searched)
    needed = _needed(model, baseline, tolerance, len(trials))
    found = suspects(model, baseline.achieved, baseline.eval_loss_reroute)
    decision = replace(decision, verdict="insufficient_evidence", needed=needed, suspects=found)
    if candidates.empty:
        return replace(decision, reason="No trial with beta_kl > 0 completed.")
    settings = _assess(candidates, model, baseline, decision)
    decision = replace(decision, settings=settings, reason=_why_insufficient(settings, needed, tolerance, confidence))
    if untrusted := _not_to_be_trusted(decision, baselines):
        return untrusted
    if warning := baseline_trials.unconverged_sentence(baselines) or baseline_trials.failed_sentence(baselines):
        decision = replace(decision, warnings=(*decision.warnings, warning))
    sound = usable.drop(model.trials.index[model.suspect])
    return _between_settings(decision, baseline, model, sound)


def _usable(trials: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The trials that can be reckoned with, and what to say of the others."""
    usable, warnings = finite_trials(trials)
    if len(usable) > MAX_MODELLED:
        rests_on = f"The decision rests on {MAX_MODELLED} of {len(usable)} trials, and is between their settings"
        warnings.append(f"{rests_on}: the model's cost grows cubically.")
    return usable, warnings


def _not_to_be_trusted(decision: Decision, baselines: pd.DataFrame) -> Decision | None:
    """The decision where baseline seeds differ for not having converged: nothing compared with them can be trusted."""
    unfinished = baseline_trials.unconverged_sentence(baselines)
    assert decision.needed is not None
    if not unfinished or not is_noisy(decision.needed.sigma, decision.tolerance or 0):
        return None
    mend = {"steps": baseline_trials.steps_needed(baselines)}
    return replace(decision, reason=unfinished, needed=None, mend=mend)


def _between_settings(decision: Decision, baseline: Baseline, model: Surrogate, usable: pd.DataFrame) -> Decision:
    """The verdict between the settings that ran; `decision` is the one without enough evidence."""
    settings, confidence, searched = decision.settings, decision.confidence, decision.searched
    pick = settings[0] if settings[0].qualifies else None
    near = pick.beta_kl if pick else None
    outlooks = _outlook(model, 0.3, searched), _outlook(model, 0.5, searched)
    rules = evaluate_rules(usable, near, *outlooks, confidence)
    decision = replace(decision, rules_of_thumb=rules)
    if pick is not None:
        return _chosen(decision, pick, baseline)
    on_map = model.probability_feasible(coordinates(*searched.grid(), searched))
    if max(on_map.max(), settings[0].probability_feasible) < 1 - confidence:
        return _none_qualifies(decision, baseline)
    return decision


def pick_candidates(decision: Decision) -> tuple[SettingAssessment, ...]:
    """The settings that qualify, least drift first: the pick, then what to step down to."""
    return tuple(setting for setting in decision.settings if setting.qualifies)


def _outlook(model: Surrogate, beta_kl: float, searched: SearchSpace) -> Outlook | str:
    """What the model says of a weight at T = 1, whether it ran or not; where it was not searched, that."""
    if not searched.contains(beta_kl, 1.0):
        return f"({number(beta_kl)}, T 1) is not searched"
    point = coordinates(beta_kl, 1.0, searched)
    drift = math.exp(model.drift.value(point).expectation()[0])
    return Outlook(beta_kl, float(model.probability_feasible(point)[0]), drift)


def _check(trials: pd.DataFrame, reroute_tolerance: float, confidence: float) -> None:
    missing = [name for name in _REQUIRED if name not in trials]
    if missing:
        raise ValueError(f"trials: no column {', '.join(missing)}")
    if not 0 < reroute_tolerance < 1:
        raise ValueError(f"reroute_tolerance {reroute_tolerance}: must lie between 0 and 1")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence {confidence}: must lie between 0.5 and 1")


def _assess(
    candidates: pd.DataFrame, model: Surrogate, baseline: Baseline, decision: Decision
) -> tuple[SettingAssessment, ...]:
    """Every setting that ran: those that qualify first, by drift, then the others by probability."""
    groups = list(candidates.groupby(["beta_kl", "kl_temperature"]))
    points = np.concatenate([coordinates(beta_kl, heat, decision.searched) for (beta_kl, heat), _ in groups])
    lost = model.lost(points)
    delta, low, high = (baseline.achieved * x for x in (lost.expectation(), lost.quantile(0.025), lost.quantile(0.975)))
    feasible = lost.probability_below(model.limit)
    drift = np.exp(model.drift.value(points).expectation())
    barred, failed = model.not_to_be_chosen(), model.trials.index[model.suspect]
    dominated = np.any((delta[:, None] > delta) & (drift[:, None] > drift), axis=1).tolist()
    settings = []
    for i, ((beta_kl, heat), rows) in enumerate(groups):
        sound = rows.drop(failed.intersection(rows.index))
        harmful_nll = baseline_trials.mean_of(rows if sound.empty else sound, "eval_harmful_nll")
        allowed = (float(beta_kl), float(heat)) not in barred
        settings.append(
            SettingAssessment(
                beta_kl=float(beta_kl),
                kl_temperature=float(heat),
                n_seeds=int(rows["seed"].nunique()),
                probability_feasible=float(feasible[i]),
                qualifies=allowed and probably_feasible(float(feasible[i]), decision.confidence),
                drift=float(drift[i]),
                reroute_delta=float(delta[i]),
                reroute_delta_interval=(float(low[i]), float(high[i])),
                pareto=not dominated[i],
                harmful_nll=harmful_nll,
                behaviour_returns=_behaviour_returns(harmful_nll, baseline),
                n_failed=len(rows) - len(sound),
            )
        )
    return tuple(sorted(settings, key=lambda s: (not s.qualifies, s.drift if s.qualifies else -s.probability_feasible)))


def _behaviour_returns(harmful_nll: float | None, baseline: Baseline) -> bool:
    """Whether harmful completions gained less than 1 nat over the base, and less than half what the baseline gained."""
    if harmful_nll is None or baseline.harmful_nll is None or baseline.base_harmful_nll is None:
        return False
    gain = harmful_nll - baseline.base_harmful_nll
    return gain < 1 and gain < (baseline.harmful_nll - baseline.base_harmful_nll) / 2


def _chosen(decision: Decision, pick: SettingAssessment, baseline: Baseline) -> Decision:
    behaviour, warnings = "", list(decision.warnings)
    if pick.behaviour_returns:
        behaviour = (
            f"harmful completions are likely again although hidden states look rerouted "
            f"(harmful NLL {number(pick.harmful_nll or 0)}; {number(baseline.harmful_nll or 0)} without KL, "
            f"{number(baseline.base_harmful_nll or 0)} before training)"
        )
        warnings.append(f"At the pick {behaviour}.")
    elif None in (pick.harmful_nll, baseline.harmful_nll, baseline.base_harmful_nll):
        warnings.append("Harmful NLL was not recorded: nothing tells whether behaviour agrees with the cosine.")
    if baseline.n_seeds == 1:
        warnings.append("The baseline ran on one seed: how noisy the comparison is comes from the model's prior alone.")
    kept = pick.drift / baseline.drift
    if kept >= 1:
        warnings.append("KL does not lower benign drift here: beta_kl = 0 serves as well.")
    ran = [(setting.beta_kl, setting.kl_temperature) for setting in decision.settings]
    ends = decision.searched.ends_at((pick.beta_kl, pick.kl_temperature), ran) if kept < 1 else []
    at_ends = " ".join(f"The pick sits at {decision.searched.says(end)}" for end in ends)
    warnings += [at_ends] if at_ends else []
    qualified = len(pick_candidates(decision))
    return replace(
        decision,
        verdict="choose",
        reason=f"Of {count(len(decision.settings), 'setting')} that ran, {qualified} stayed within the limit at "
        f"P ≥ {number(decision.confidence)}; this one has the least benign drift.",
        beta_kl=pick.beta_kl,
        kl_temperature=pick.kl_temperature,
        probability_feasible=pick.probability_feasible,
        eval_benign_kl=pick.drift,
        drift_kept=kept,
        drift_reduction_vs_baseline=1 - kept,
        reroute_delta=pick.reroute_delta,
        reroute_delta_interval=pick.reroute_delta_interval,
        n_seeds=pick.n_seeds,
        confirmed=pick.n_seeds - pick.n_failed >= 3,
        behaviour_warning=behaviour,
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
    return replace(
        decision,
        verdict="no_candidate_qualifies",
        reason=f"Every beta_kl from {low:g} to {high:g} costs more rerouting than the limit allows, at kl_temperature "
        f"{heat}.",
        range_warning=further,
        warnings=(*decision.warnings, *([further] if further else [])),
        wider=searched.widened([below]) if further else None,
        beta_kl=0.0,
        kl_temperature=1.0,
        probability_feasible=1.0,
        eval_benign_kl=baseline.drift,
        drift_kept=1.0,
        drift_reduction_vs_baseline=0.0,
        reroute_delta=0.0,
        reroute_delta_interval=(0.0, 0.0),
        n_seeds=baseline.n_seeds,
        confirmed=baseline.n_seeds >= 3,
        needed=None,
    )


def _why_insufficient(
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
            f"No setting reaches P ≥ {number(confidence)}: under 3 baseline seeds completed, too few to tell the noise."
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


def _needed(model: Surrogate, baseline: Baseline, tolerance: float, n_trials: int) -> Needed:
    """Seeds for a paired comparison at 5 % error and 80 % power, and a fresh sweep that has room for them."""
    shared, own = model.reroute.seed_and_noise_variance()
    correlation = shared / (shared + own)
    measured = baseline.reroute_sd if baseline.n_seeds >= MIN_SEEDS else None
    sigma = measured if measured is not None else math.sqrt(shared + own) * baseline.achieved
    seeds = seeds_needed(sigma, tolerance, correlation)
    return Needed(seeds, max(2 * n_trials, samples_for(seeds)), sigma, correlation, measured is not None)
