"""Runs that failed: the likelihood against all sets of failures, and what a decision makes of failed trials.

The tables are those of a finished sweep in which single trials are turned into what a seed looks like at which nothing
collapsed: reroute near 1, drift near 0.
"""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal
from synthetic import MakeRun, Surface, failing, make_trials, repeated

from analysis.constraint import failed_seeds, fails_often
from analysis.decide import decide
from analysis.decision import Decision
from analysis.pick_beta import main
from analysis.report.wording import headline
from analysis.surrogate.failures import Failures, explained
from analysis.surrogate.gaussian_process import fit
from analysis.surrogate.kernel import REROUTE_PRIOR, coordinates, observed_covariance

NAMED = ("beta_kl", "kl_temperature")


def pick_of(decision: Decision) -> tuple[float, float]:
    assert decision.verdict == "choose", decision.reason
    assert decision.beta_kl is not None
    assert decision.kl_temperature is not None
    return decision.beta_kl, decision.kl_temperature


@pytest.fixture
def sweep() -> pd.DataFrame:
    return make_trials(Surface())


def id_of(trials: pd.DataFrame, setting: tuple[float, float]) -> str:
    here = (trials["beta_kl"] == setting[0]) & (trials["kl_temperature"] == setting[1])
    return str(trials.loc[here, "trial_id"].iloc[0])


def test_the_failures_of_a_draw_are_the_likeliest_of_all_sets():
    x = coordinates([0, 0, 0, 0.1, 0.3, 1.5], [1, 1, 1, 1, 2, 4])
    y = np.array([0, 0.01, 0.9, 0.02, 0.05, 0.3])
    y -= y.mean()
    theta = np.log([[0.4, 1, 0.15, 0.005, 0.006], [0.3, 1, 0.3, 0.01, 0.3], [1, 1, 0.1, 1e-5, 1e-6]])
    observed = observed_covariance(x, np.array([0, 1, 2, 0, 1, 0]), theta, 1.0)
    rate, density = 0.05, 0.5
    likelihood, failed = explained(observed, y, Failures(np.full(6, rate), density))
    sets = [out for size in range(3) for out in itertools.combinations(range(6), size)]
    for draw in range(3):
        by_set = {}
        for out in sets:
            kept = [i for i in range(6) if i not in out]
            normal = multivariate_normal(np.zeros(len(kept)), observed[draw][np.ix_(kept, kept)], allow_singular=True)
            odds = len(out) * math.log(rate * density) + len(kept) * math.log(1 - rate)
            by_set[out] = float(normal.logpdf(y[kept])) + odds
        best = max(by_set, key=by_set.__getitem__)
        assert tuple(np.flatnonzero(failed[draw])) == best
        assert likelihood[draw] == pytest.approx(by_set[best], abs=1e-4)
    assert failed.sum(axis=1).tolist() == [1, 0, 2]


def test_what_failed_has_no_part_in_the_posterior():
    x = coordinates([0.0, 0.0, 0.0, 0.1, 0.3, 0.5, 1.5], [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 4.0])
    seed, y = np.array([0, 1, 2, 0, 1, 0, 1]), np.array([0.0, 0.01, 0.95, 0.02, 0.05, 0.11, 0.30])
    with_it, others = fit(x, seed, y, REROUTE_PRIOR), np.arange(7) != 2
    without = fit(x[others], seed[others], y[others], REROUTE_PRIOR)
    assert with_it.probability_failed()[2] > 0.99
    points = coordinates([0.2, 0.9], [1.5, 3.0])
    said, expected = (each.difference(points, x[0]) for each in (with_it, without))
    np.testing.assert_allclose(said.expectation(), expected.expectation(), atol=0.01)
    np.testing.assert_allclose(said.probability_below(0.1), expected.probability_below(0.1), atol=0.03)


def test_two_trials_that_agree_are_no_failures():
    x = coordinates([0.0, 0.0, 0.1, 0.3, 1.5, 1.6], [1.0, 1.0, 1.0, 1.0, 4.0, 4.0])
    posterior = fit(x, np.array([0, 1, 0, 0, 0, 1]), np.array([0, 0.005, 0.01, 0.02, 0.8, 0.82]), REROUTE_PRIOR)
    assert posterior.probability_failed()[4:].max() < 0.2


@pytest.mark.parametrize(
    ("losses", "failed"),
    [
        ((0.01, 0.02, 0.012), (False, False, False)),
        ((0.016, 0.007, 0.498), (False, False, True)),
        ((0.01, 1.0), (False, True)),
        ((0.999, 0.998), (False, False)),
        ((0.2, 0.39, 0.41), (False, False, True)),
    ],
)
def test_a_seed_failed_where_it_lost_a_quarter_of_what_the_best_achieved(losses, failed):
    assert failed_seeds(losses) == failed


def test_failing_is_a_settings_nature_from_two_seeds_and_half_of_them():
    assert [fails_often(*case) for case in ((1, 1), (1, 2), (2, 3), (2, 4), (2, 5))] == [
        False,
        False,
        True,
        True,
        False,
    ]


def test_a_failed_baseline_seed_changes_no_pick_and_is_named(sweep):
    decision = decide(failing(sweep, "t001"))
    assert pick_of(decision) == pick_of(decide(sweep))
    assert [(each.trial_id, each.seed) for each in decision.suspects] == [("t001", 1)]
    assert decision.needed is None
    assert any("1 of 4 baseline seeds never rerouted as the others did (t001, seed 1: reroute 0.97)" in w
               for w in decision.warnings), decision.warnings  # fmt: skip


def test_a_failed_confirmation_changes_no_pick_and_lowers_no_probability(sweep):
    pick = pick_of(decide(sweep))
    confirmed = repeated(sweep, pick, (2, 3))
    sound, one_failed = decide(confirmed), decide(failing(confirmed, "t101"))
    assert pick_of(one_failed) == pick_of(sound) == pick
    assert (one_failed.probability_feasible or 0) > 0.95
    assert sound.confirmed
    assert not one_failed.confirmed
    assert one_failed.settings[0].n_failed == 1
    assert [each.trial_id for each in one_failed.suspects] == ["t101"]


def test_a_failed_ablation_point_is_no_infeasible_one(sweep):
    decision = decide(failing(sweep, "t004"))  # (0.1, T 1)
    assert pick_of(decision) == pick_of(decide(sweep))
    (suspect,) = decision.suspects
    assert suspect.trial_id == "t004"
    assert suspect.metrics == ("eval_loss_reroute", "eval_benign_kl")
    assert suspect.evidence.startswith("reroute +0.9")
    at_01 = next(setting for setting in decision.settings if setting.beta_kl == 0.1)
    assert not at_01.qualifies  # it has no trial that did not fail
    assert at_01.probability_feasible > 0.95


def test_two_of_three_seeds_failed_is_the_settings_nature(sweep):
    pick = pick_of(decide(sweep))
    trials = failing(repeated(sweep, pick, (2, 3)), "t100", "t101")
    decision = decide(trials)
    assert pick_of(decision) != pick
    left = next(setting for setting in decision.settings if (setting.beta_kl, setting.kl_temperature) == pick)
    assert not left.qualifies
    assert (left.n_failed, left.n_seeds) == (2, 3)


def test_drift_alone_that_no_neighbour_bears_out_is_suspect_and_earns_no_pick(sweep):
    lucky = id_of(sweep, (0.1, 1.0))
    trials = sweep.copy()
    trials.loc[trials["trial_id"] == lucky, "eval_benign_kl"] *= 1e-4
    decision = decide(trials)
    assert pick_of(decision) == pick_of(decide(sweep))
    assert [(each.trial_id, each.metrics) for each in decision.suspects] == [(lucky, ("eval_benign_kl",))]
    assert "benign drift" in decision.suspects[0].evidence


def test_baselines_whose_drift_differs_as_it_does_without_kl_are_no_suspects(sweep):
    trials = sweep.copy()
    trials.loc[trials["beta_kl"] == 0, "eval_benign_kl"] *= [0.05, 1.0, 1.0, 12.0]
    decision = decide(trials)
    assert decision.suspects == ()
    assert pick_of(decision) == pick_of(decide(sweep))


def test_a_baseline_that_the_model_doubts_has_no_part_in_limit_and_noise(sweep):
    quiet = make_trials(Surface(), noise=0.001)
    doubted = failing(quiet, "t001", loss=0.2, drift=1.0)  # too near for the rule of a quarter
    decision, expected = decide(doubted), decide(quiet.drop(index=1))
    assert [each.trial_id for each in decision.suspects] == ["t001"]
    assert decision.baseline is not None
    assert expected.baseline is not None
    assert (decision.baseline.n_seeds, decision.baseline.n_failed) == (3, 1)
    assert decision.baseline.reroute_sd == pytest.approx(expected.baseline.reroute_sd)
    assert decision.tolerance == pytest.approx(expected.tolerance)
    assert any("1 of 4 baseline seeds never rerouted as the others" in warning for warning in decision.warnings)


def test_a_pick_of_two_seeds_of_which_one_failed_rests_on_one(sweep):
    pick = pick_of(decide(sweep))
    decision = decide(failing(repeated(sweep, pick, (1,)), "t100"))
    assert (decision.n_seeds, decision.n_sound_seeds) == (2, 1)
    assert "on one seed" in headline(decision)


def test_a_setting_that_fails_often_and_drifts_less_is_said_to_be_passed_over(sweep):
    pick = pick_of(decide(sweep))
    decision = decide(failing(repeated(sweep, pick, (2, 3)), "t100", "t101"))
    assert "beta_kl 0.3, T 1.0 was passed over: 2 of 3 seeds failed there." in decision.warnings


def test_trials_without_names_are_judged_all_the_same(sweep):
    decision = decide(failing(sweep, "t001").drop(columns="trial_id"))
    assert decision.verdict == "choose"


def test_a_lone_trial_that_keeps_rerouting_where_all_around_it_lose_it_makes_no_pick(sweep):
    over = sweep[(sweep["beta_kl"] > 0.3) & (sweep["phase"] == "search")].iloc[0]
    trials = sweep.copy()
    trials.loc[trials["trial_id"] == over["trial_id"], "eval_loss_reroute"] = 0.0
    assert pick_of(decide(trials)) != (over["beta_kl"], over["kl_temperature"])


def test_most_baseline_seeds_failed_and_nothing_is_compared(sweep):
    decision = decide(failing(sweep, "t001", "t002"))
    assert decision.verdict == "baseline_never_rerouted"
    assert "2 of 4 baseline seeds never rerouted as the others did (t001, seed 1" in decision.reason


def test_the_command_and_the_report_name_what_failed(make_run: MakeRun, sweep, capsys):
    run = make_run(failing(sweep, "t004"))
    assert main([str(run)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    said = "t004, seed 0, beta_kl 0.1, T 1.0: reroute +0.9"
    assert f"suspect: {said}" in output
    for name in ("report.md", "report.html"):
        assert said in " ".join((run / "report" / name).read_text().split()), name
