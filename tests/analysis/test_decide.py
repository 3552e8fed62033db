"""The decision: every verdict from surfaces whose truth is known, and what must not change it."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from synthetic import BASE_HARMFUL_NLL, BASELINE_DRIFT, BASELINE_LOSS, Surface, make_trials

from analysis.decide import decide
from analysis.decision import Decision
from analysis.report.wording import headline
from analysis.verdict import pick_candidates


def truly_lost(surface: Surface, decision: Decision) -> float:
    return float(surface.lost(np.array([decision.beta_kl]), np.array([decision.kl_temperature]))[0])


def test_chooses_the_least_drift_within_the_limit(trials: pd.DataFrame) -> None:
    decision = decide(trials)
    assert decision.verdict == "choose"
    limit = 0.05 * (1 - BASELINE_LOSS)
    assert decision.tolerance == pytest.approx(limit, abs=5e-4)
    assert truly_lost(Surface(), decision) <= limit
    candidates = trials[trials["beta_kl"] > 0]
    heat = candidates["kl_temperature"].to_numpy()
    feasible = Surface().lost(candidates["beta_kl"].to_numpy(), heat) <= limit
    best = Surface().drift(candidates["beta_kl"].to_numpy(), heat)[feasible].min()
    assert decision.eval_benign_kl == pytest.approx(best, rel=0.3)
    assert decision.drift_kept == pytest.approx(decision.eval_benign_kl / decision.baseline.drift)
    assert decision.drift_reduction_vs_baseline == pytest.approx(1 - decision.drift_kept)
    low, high = decision.reroute_delta_interval
    assert low < decision.reroute_delta < high < decision.tolerance


def test_qualified_settings_come_first_by_drift(trials: pd.DataFrame) -> None:
    decision = decide(trials)
    ladder = pick_candidates(decision.settings)
    assert ladder == decision.settings[: len(ladder)]
    assert len(ladder) >= 2
    assert [s.drift for s in ladder] == sorted(s.drift for s in ladder)
    assert (ladder[0].beta_kl, ladder[0].kl_temperature) == (decision.beta_kl, decision.kl_temperature)
    assert all(s.probability_feasible < 0.95 for s in decision.settings[len(ladder) :])
    assert ladder[0].pareto


def test_recommends_zero_where_any_kl_costs_too_much() -> None:
    decision = decide(make_trials(Surface(always_lost=0.2), searched=14))
    assert decision.verdict == "no_candidate_qualifies", decision.reason
    assert decision.beta_kl == 0
    assert decision.drift_reduction_vs_baseline == 0
    assert pick_candidates(decision.settings) == ()


def test_all_run_settings_infeasible_is_no_proof_for_the_untried_map() -> None:
    decision = decide(make_trials(Surface(threshold=0.01, slope=0.2), searched=0))
    assert decision.verdict == "insufficient_evidence"
    assert "untried" in decision.reason


def test_noise_beyond_the_limit_is_insufficient_evidence_and_says_what_would_suffice() -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=2)
    decision = decide(trials)
    assert decision.verdict == "insufficient_evidence", decision.reason
    assert decision.beta_kl is None
    needed = decision.needed
    formula = 12.4 * (1 - needed.correlation) * (needed.sigma / decision.tolerance) ** 2
    assert needed.seeds == max(3, np.ceil(formula)), (needed, formula)
    assert needed.num_samples > len(trials)
    assert "seed noise" in decision.reason


def test_no_completed_candidate_is_insufficient_evidence(trials: pd.DataFrame) -> None:
    decision = decide(trials[trials["beta_kl"] == 0])
    assert decision.verdict == "insufficient_evidence"
    assert decision.reason == "No trial with beta_kl > 0 completed."


def test_a_baseline_that_never_rerouted_makes_no_comparison(trials: pd.DataFrame) -> None:
    decision = decide(trials.assign(eval_loss_reroute=0.9))
    assert decision.verdict == "baseline_never_rerouted"
    assert decision.beta_kl is None
    assert decision.settings == ()


def test_without_a_completed_baseline_nothing_is_compared(trials: pd.DataFrame) -> None:
    failed = trials.copy()
    failed.loc[failed["beta_kl"] == 0, "status"] = "failed"
    decision = decide(failed)
    assert decision.verdict == "baseline_failed"
    assert "4 failed" in decision.reason
    assert decide(trials.iloc[:0]).verdict == "baseline_failed"


def test_a_shift_common_to_a_seed_changes_little() -> None:
    shift = np.array([0.05, -0.03, 0.04, 0.0])
    plain = make_trials(Surface(), noise=0.003)
    plain["eval_loss_reroute"] += 0.1
    shifted = plain.assign(eval_loss_reroute=plain["eval_loss_reroute"] + shift[plain["seed"]])
    before, after = decide(plain), decide(shifted)
    assert after.verdict == "choose"
    assert (after.beta_kl, after.kl_temperature) == (before.beta_kl, before.kl_temperature)
    assert after.reroute_delta == pytest.approx(before.reroute_delta, abs=0.01)
    assert after.needed is None
    assert after.baseline.reroute_sd > 5 * before.baseline.reroute_sd


def test_derived_columns_are_never_read(trials: pd.DataFrame) -> None:
    lies = trials.assign(feasible="False", reroute_regression=9.9, tolerance=0.0)
    assert decide(lies) == decide(trials)
    assert decide(trials.drop(columns=["feasible", "reroute_regression"])) == decide(trials)


def test_probability_rises_with_the_tolerance(trials: pd.DataFrame) -> None:
    def probabilities(tolerance: float) -> dict[tuple[float, float], float]:
        settings = decide(trials, reroute_tolerance=tolerance).settings
        return {(s.beta_kl, s.kl_temperature): s.probability_feasible for s in settings}

    tight, loose = probabilities(0.02), probabilities(0.10)
    assert all(loose[key] >= tight[key] for key in tight), (tight, loose)
    assert decide(trials, reroute_tolerance=0.10).eval_benign_kl < decide(trials, reroute_tolerance=0.02).eval_benign_kl


def test_more_confidence_never_allows_more_settings(trials: pd.DataFrame) -> None:
    counts = [len(pick_candidates(decide(trials, confidence=c).settings)) for c in (0.6, 0.9, 0.99, 0.9999)]
    assert counts == sorted(counts, reverse=True), counts


def test_failed_running_and_non_finite_trials_do_not_count(trials: pd.DataFrame) -> None:
    extra = trials.iloc[[6, 7, 9]].assign(eval_loss_reroute=0.0, eval_benign_kl=1e-6)
    extra["status"] = ["failed", "running", "completed"]
    extra.iloc[2, extra.columns.get_loc("eval_benign_kl")] = np.nan
    decision = decide(pd.concat([trials, extra], ignore_index=True))
    clean = decide(trials)
    assert decision.settings == clean.settings
    assert decision.n_trials == len(trials)
    assert any("without finite metrics" in warning for warning in decision.warnings)


def test_a_stopped_trial_counts_against_its_place_and_its_partial_metrics_do_not(trials: pd.DataFrame) -> None:
    clean = decide(trials)
    pick = clean.settings[0]
    stopped = trials.iloc[[6]].assign(
        status="stopped", beta_kl=1.02 * pick.beta_kl, kl_temperature=pick.kl_temperature, eval_benign_kl=1e-6
    )
    with_stopped = decide(pd.concat([trials, stopped], ignore_index=True))
    other = decide(pd.concat([trials, stopped.assign(eval_loss_reroute=0.0, eval_benign_kl=9.0)], ignore_index=True))
    assert with_stopped == other
    again = next(s for s in with_stopped.settings if s.beta_kl == pick.beta_kl)
    assert again.probability_feasible < pick.probability_feasible - 0.05, (again, pick)
    assert again.drift == pick.drift
    assert with_stopped.n_trials == clean.n_trials
    assert len(with_stopped.settings) == len(clean.settings)


def test_one_baseline_is_enough_to_choose_but_is_said() -> None:
    decision = decide(make_trials(Surface(), baselines=1, searched=12))
    assert decision.verdict == "choose", decision.reason
    assert decision.baseline.reroute_sd is None
    assert any("one seed" in warning for warning in decision.warnings)
    assert truly_lost(Surface(), decision) <= decision.tolerance


def test_confirmed_needs_three_seeds_of_the_pick(trials: pd.DataFrame) -> None:
    first = decide(trials)
    assert (first.n_seeds, first.confirmed) == (1, False)
    row = trials[(trials["beta_kl"] == first.beta_kl) & (trials["kl_temperature"] == first.kl_temperature)]
    repeats = pd.concat([row.assign(seed=seed, phase="confirm") for seed in (1, 2)])
    pooled = decide(pd.concat([trials, repeats], ignore_index=True))
    assert pooled.beta_kl == first.beta_kl
    assert (pooled.n_seeds, pooled.confirmed) == (3, True)


@pytest.mark.parametrize(
    ("candidate", "baseline", "warned"), [(0.5, 8.0, True), (1.5, 8.0, False), (0.5, 0.8, False), (0.2, 0.8, True)]
)
def test_where_harmful_completions_become_likely_again_nothing_is_chosen(
    trials: pd.DataFrame, candidate: float, baseline: float, warned: bool
) -> None:
    gain = np.where(trials["beta_kl"] > 0, candidate, baseline)
    decision = decide(trials.assign(eval_harmful_nll=BASE_HARMFUL_NLL + gain))
    assert decision.verdict == ("no_setting_behaves" if warned else "choose")
    assert ("likely again" in decision.reason) is warned


def test_a_setting_at_which_they_are_likely_again_gives_way_to_one_beside_it(trials: pd.DataFrame) -> None:
    first = decide(trials)
    here = (trials["beta_kl"] == first.beta_kl) & (trials["kl_temperature"] == first.kl_temperature)
    decision = decide(trials.assign(eval_harmful_nll=np.where(here, BASE_HARMFUL_NLL + 0.4, BASE_HARMFUL_NLL + 8)))
    second = next(setting for setting in first.settings[1:] if setting.qualifies)
    assert (decision.verdict, decision.beta_kl) == ("choose", second.beta_kl)
    assert any("drifts less and was passed over: harmful completions are likely again" in w for w in decision.warnings)


def test_a_pick_that_does_not_lower_drift_says_so_in_the_first_sentence(trials: pd.DataFrame) -> None:
    worse = trials.assign(eval_benign_kl=np.where(trials["beta_kl"] > 0, 0.02, 0.015))
    decision = decide(worse)
    assert (decision.verdict, decision.drift_kept >= 1) == ("choose", True)
    assert "benign drift is no less than at beta_kl = 0" in headline(decision)
    assert "no less than" not in headline(decide(trials))


def test_unrecorded_harmful_nll_is_said(trials: pd.DataFrame) -> None:
    decision = decide(trials.drop(columns=["eval_harmful_nll", "base_harmful_nll"]))
    assert decision.verdict == "choose"
    assert any("not recorded" in warning for warning in decision.warnings)


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_recommendations_are_truly_feasible_over_random_surfaces(noise: float) -> None:
    chosen, infeasible = 0, []
    for index in range(40):
        rng = np.random.default_rng(1000 + index)
        surface = Surface(
            threshold=float(np.exp(rng.uniform(-4, 0))),
            slope=float(rng.uniform(0.05, 0.25)),
            width=float(rng.uniform(0.2, 0.6)),
            temperature_weight=float(rng.uniform(0, 1.5)),
        )
        shared = noise * (0, 1)[index % 2]
        decision = decide(make_trials(surface, noise=noise, shared=shared, searched=12, rng_seed=index))
        if decision.verdict == "choose":
            chosen += 1
            if truly_lost(surface, decision) > 0.05 * (1 - BASELINE_LOSS):
                infeasible.append(index)
    assert chosen >= 34, chosen
    assert len(infeasible) <= 1, (chosen, infeasible)


def test_a_perfectly_quiet_sweep_is_decided_too() -> None:
    trials = make_trials(Surface(), noise=0.0)
    trials["eval_benign_kl"] = trials["eval_benign_kl"].where(trials["beta_kl"] < 1, 0.0)
    decision = decide(trials)
    assert decision.verdict == "choose"
    assert truly_lost(Surface(), decision) <= decision.tolerance


def test_every_number_of_a_decision_is_finite(trials: pd.DataFrame) -> None:
    def numbers(value: object) -> list[float]:
        if isinstance(value, dict):
            return [x for item in value.values() for x in numbers(item)]
        if isinstance(value, list | tuple):
            return [x for item in value for x in numbers(item)]
        return [value] if isinstance(value, float) else []

    found = numbers(dataclasses.asdict(decide(trials)))
    assert len(found) > 50
    assert np.isfinite(found).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"reroute_tolerance": 0.0}, "reroute_tolerance"), ({"confidence": 1.0}, "confidence")],
)
def test_arguments_out_of_range_are_named(trials: pd.DataFrame, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decide(trials, **arguments)


def test_a_missing_column_is_named(trials: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="eval_benign_kl"):
        decide(trials.drop(columns="eval_benign_kl"))


def test_baseline_summary_is_of_the_raw_columns(trials: pd.DataFrame) -> None:
    baseline = decide(trials).baseline
    losses = trials.loc[trials["beta_kl"] == 0, "eval_loss_reroute"]
    assert baseline.eval_loss_reroute == pytest.approx(losses.mean())
    assert baseline.reroute_sd == pytest.approx(losses.std(ddof=1))
    assert baseline.n_seeds == 4
    assert baseline.drift == pytest.approx(BASELINE_DRIFT, rel=0.1)
