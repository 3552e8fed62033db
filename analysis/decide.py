"""Which beta_kl to ship, from a sweep's trials: a table in, a `Decision` out. No file, no clock.

Among the settings that were run, the one with the lowest posterior mean drift whose probability of losing at most
`reroute_tolerance` of the baseline's rerouting is at least `confidence`, under the model of `analysis.surrogate`.
Everything is computed from raw metrics, so that tolerance and confidence can be changed after the sweep.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pandas as pd

from analysis import baseline as baseline_trials
from analysis.behaviour.judge import DEFAULT_LIMITS, BehaviourLimits, Judge
from analysis.behaviour.measured import Behaviour
from analysis.constraint import (
    CONFIDENCE,
    REROUTE_TOLERANCE,
    baseline_rerouted,
    fails_often,
    probably_feasible,
)
from analysis.decision import Baseline, Decision, Needed, SettingAssessment
from analysis.formatting import number
from analysis.noise import MIN_SEEDS, is_noisy, samples_for, seeds_needed
from analysis.rules_of_thumb import TOO_FEW, evaluate_rules
from analysis.sensitivity import alternatives
from analysis.surrogate.kernel import coordinates
from analysis.surrogate.search_space import DEFAULT_SPACE, SearchSpace
from analysis.surrogate.surrogate import MAX_MODELLED, METRICS, Surrogate, finite_trials
from analysis.suspects import suspects
from analysis.verdict import between_settings, why_insufficient

_REQUIRED = ("beta_kl", "kl_temperature", "seed", "status", *METRICS)


def decide(
    trials: pd.DataFrame,
    *,
    reroute_tolerance: float = REROUTE_TOLERANCE,
    confidence: float = CONFIDENCE,
    searched: SearchSpace = DEFAULT_SPACE,
    draws: int | None = None,
    trained: Mapping[str, Any] = MappingProxyType({}),
    behaviour: Sequence[Behaviour] = (),
    limits: BehaviourLimits = DEFAULT_LIMITS,
) -> Decision:
    """Decide from raw trials (columns of `trials.csv`); only completed ones with finite metrics count.

    Arguments and errors are those of `decide_with_model`.
    """
    return decide_with_model(
        trials,
        reroute_tolerance=reroute_tolerance,
        confidence=confidence,
        searched=searched,
        draws=draws,
        trained=trained,
        behaviour=behaviour,
        limits=limits,
    )[0]


def decide_with_model(
    trials: pd.DataFrame,
    *,
    reroute_tolerance: float = REROUTE_TOLERANCE,
    confidence: float = CONFIDENCE,
    searched: SearchSpace = DEFAULT_SPACE,
    draws: int | None = None,
    trained: Mapping[str, Any] = MappingProxyType({}),
    behaviour: Sequence[Behaviour] = (),
    limits: BehaviourLimits = DEFAULT_LIMITS,
) -> tuple[Decision, Surrogate | None]:
    """The decision, and the model that it rests on; None where no baseline can be compared with.

    Args:
        searched: the ranges that the sweep searched, over which the map goes. Trials outside count as any others.
        draws: hyper-parameter draws to average over at most; None is all that carry weight.
        trained: fields of the trials' configuration, for advice on one that never rerouted or does not behave.
        behaviour: what measured models write, as `load_behaviour` gives it; a setting that was not measured is judged
            by its metrics alone.
        limits: what a setting may do to that.

    Raises:
        ValueError: a column that is needed is missing, or an argument is out of its range.
    """
    _check(trials, reroute_tolerance, confidence)
    usable, warnings = _usable(trials)
    baselines = usable[usable["beta_kl"] == 0]
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
        return decision, None
    failed = baseline_trials.failed_by_rule(baselines)
    decision = _with_baseline(decision, baselines, usable, failed)
    often = fails_often(len(failed), len(baselines))
    if often or not baseline_rerouted(baselines["eval_loss_reroute"]):
        of = baseline_trials.often_failed if often else baseline_trials.never_rerouted
        reason, mend = of(baselines, trained)
        return replace(decision, verdict="baseline_never_rerouted", reason=reason, mend=mend), None
    model = Surrogate.of(trials, reroute_tolerance, draws, searched)
    failed = failed.union(model.failed_baselines)
    decision = _with_baseline(decision, baselines, usable, failed)
    recipe_fails = filter(None, [baseline_trials.failed_sentence(baselines, failed)])
    decision = replace(decision, warnings=(*decision.warnings, *recipe_fails))
    return _by_model(decision, model, trials, baselines, Judge(behaviour, limits, confidence), trained), model


def _with_baseline(decision: Decision, baselines: pd.DataFrame, usable: pd.DataFrame, failed: pd.Index) -> Decision:
    baseline = baseline_trials.summary(baselines, usable, failed)
    return replace(decision, baseline=baseline, tolerance=decision.reroute_tolerance * baseline.achieved)


def _by_model(
    decision: Decision,
    model: Surrogate,
    trials: pd.DataFrame,
    baselines: pd.DataFrame,
    judge: Judge,
    trained: Mapping[str, Any],
) -> Decision:
    """The decision, its baseline known; between all settings that ran."""
    baseline, tolerance = decision.baseline, decision.tolerance
    assert baseline is not None
    assert tolerance is not None
    needed = _needed(model, baseline, tolerance, len(trials))
    found = suspects(model, baseline.achieved, baseline.eval_loss_reroute)
    decision = replace(decision, verdict="insufficient_evidence", needed=needed, suspects=found)
    candidates = model.trials.query("beta_kl > 0")
    if candidates.empty:
        return replace(decision, reason="No trial with beta_kl > 0 completed.")
    of_suspects = {each.trial_id for each in found}
    judge = replace(judge, measured=[each for each in judge.measured if each.trial_id not in of_suspects])
    settings = _assess(candidates, model, baseline, decision, judge)
    n_stopped = int((trials["status"] == "stopped").sum())
    decision = replace(
        decision,
        settings=settings,
        sensitivity=alternatives(model, settings, decision.reroute_tolerance, decision.confidence, n_stopped),
        reason=why_insufficient(settings, needed, tolerance, decision.confidence),
    )
    if untrusted := _not_to_be_trusted(decision, baselines):
        return untrusted
    of_recipe = filter(None, [baseline_trials.unconverged_sentence(baselines), judge.unmoved()])
    decision = replace(decision, warnings=(*decision.warnings, *of_recipe))
    usable, _ = finite_trials(trials)
    sound = usable.drop(model.trials.index[model.suspect])
    return between_settings(decision, baseline, model, sound, trained)


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


def _check(trials: pd.DataFrame, reroute_tolerance: float, confidence: float) -> None:
    missing = [name for name in _REQUIRED if name not in trials]
    if missing:
        raise ValueError(f"trials: no column {', '.join(missing)}")
    if not 0 < reroute_tolerance < 1:
        raise ValueError(f"reroute_tolerance {reroute_tolerance}: must lie between 0 and 1")
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence {confidence}: must lie between 0.5 and 1")


def _assess(
    candidates: pd.DataFrame, model: Surrogate, baseline: Baseline, decision: Decision, judge: Judge
) -> tuple[SettingAssessment, ...]:
    """Every setting that ran: those that qualify first, by drift, then the others by probability."""
    groups = list(candidates.groupby(["beta_kl", "kl_temperature"]))
    points = np.concatenate([coordinates(beta_kl, heat, decision.searched) for (beta_kl, heat), _ in groups])
    lost = model.lost(points)
    delta, low, high, bound = (
        baseline.achieved * x
        for x in (lost.expectation(), *(lost.quantile(p) for p in (0.025, 0.975, decision.confidence)))
    )
    feasible = lost.probability_below(model.limit)
    drift = np.exp(model.drift.value(points).expectation())
    barred, failed = model.not_to_be_chosen(), model.trials.index[model.suspect]
    dominated = np.any((delta[:, None] > delta) & (drift[:, None] > drift), axis=1).tolist()
    settings = []
    for i, ((beta_kl, heat), rows) in enumerate(groups):
        sound = rows.drop(failed.intersection(rows.index))
        counted = rows if sound.empty else sound
        harmful_nll = baseline_trials.mean_of(counted, "eval_harmful_nll")
        returns = _behaviour_returns(harmful_nll, baseline)
        rise = baseline_trials.benign_nll_rise(counted)
        complaints = judge.complaints(float(beta_kl), float(heat), rise, baseline.benign_nll_rise)
        if returns:
            complaints = (*complaints, _says_that_it_returns(harmful_nll, baseline))
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
                reroute_delta_bound=float(bound[i]),
                pareto=not dominated[i],
                harmful_nll=harmful_nll,
                behaviour_returns=returns,
                complaints=complaints,
                measured=judge.has(float(beta_kl), float(heat)),
                behaviour_reservation=judge.reservation(float(beta_kl), float(heat)),
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


def _says_that_it_returns(harmful_nll: float | None, baseline: Baseline) -> str:
    return (
        f"harmful completions are likely again although hidden states look rerouted (harmful NLL "
        f"{number(harmful_nll or 0)}; {number(baseline.harmful_nll or 0)} without KL, "
        f"{number(baseline.base_harmful_nll or 0)} before training)"
    )


def _needed(model: Surrogate, baseline: Baseline, tolerance: float, n_trials: int) -> Needed:
    """Seeds for a paired comparison at 5 % error and 80 % power, and a fresh sweep that has room for them."""
    shared, own = model.reroute.seed_and_noise_variance()
    correlation = shared / (shared + own)
    measured = baseline.reroute_sd if baseline.n_seeds >= MIN_SEEDS else None
    sigma = measured if measured is not None else math.sqrt(shared + own) * baseline.achieved
    seeds = seeds_needed(sigma, tolerance, correlation)
    return Needed(seeds, max(2 * n_trials, samples_for(seeds)), sigma, correlation, measured is not None)
