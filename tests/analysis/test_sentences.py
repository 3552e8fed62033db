"""Sentences agree with their numbers: the bound that P speaks of, one seed, what nearly qualified, other limits."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from synthetic import MakeRun, Surface, make_trials

from analysis.decide import decide
from analysis.decision import Decision
from analysis.pick_beta import main
from analysis.report.wording import explanation, headline, sensitivity_line
from analysis.trials import load_trials
from analysis.verdict import nearly_chosen
from cbtrain.utils.errors import InputError


@pytest.fixture
def sweep() -> pd.DataFrame:
    return make_trials(Surface())


def test_the_bound_that_is_quoted_is_within_the_limit_just_where_p_reaches_the_confidence(sweep):
    for confidence in (0.9, 0.95, 0.99):
        decision = decide(sweep, confidence=confidence)
        assert decision.tolerance is not None
        for setting in decision.settings:
            within = setting.reroute_delta_bound <= decision.tolerance
            assert within is (setting.probability_feasible >= confidence), setting
            assert (setting.reroute_delta_bound < setting.reroute_delta_interval[1]) is (confidence < 0.975)
    said = re.search(r"(\d+) % sure that it loses at most \+([\d.]+) of ([\d.]+) allowed", explanation(decision))
    assert said is not None
    assert said[1] == "99"
    assert float(said[2]) == pytest.approx(decision.reroute_delta_bound, abs=6e-4)
    assert float(said[2]) <= float(said[3])


def test_a_pick_that_rests_on_one_seed_says_so_first(sweep):
    decision = decide(sweep)
    assert (
        headline(decision) == "Use beta_kl = 0.3 at kl_temperature = 1.0, but on one seed and behaviour not measured."
    )
    row = sweep[(sweep["beta_kl"] == 0.3) & (sweep["kl_temperature"] == 1.0)]
    twice = pd.concat([sweep, row.assign(seed=1, trial_id="t100")], ignore_index=True)
    assert "one seed" not in headline(decide(twice))


def test_a_setting_just_under_the_confidence_that_drifts_less_is_named():
    sweep = make_trials(Surface(), noise=0.012, searched=16)
    between = max(each.probability_feasible for each in decide(sweep).settings if not each.qualifies)
    assert between > 0.6, "a sweep in which a setting comes near"
    decision = decide(sweep, confidence=between + 0.02)
    near = nearly_chosen(decision)
    assert near is not None
    assert near.drift < (decision.eval_benign_kl or 0)
    assert near.probability_feasible == pytest.approx(between)
    assert f"beta_kl {near.beta_kl:.3g}" in explanation(decision)
    assert f"drifts less, P = {between:.2f}." in explanation(decision)
    assert nearly_chosen(replace(decision, settings=decision.settings[:1])) is None


def test_other_limits_and_confidences_choose_what_they_would_choose_when_asked(sweep):
    decision = decide(sweep)
    asked = [(each.reroute_tolerance, each.confidence) for each in decision.sensitivity]
    assert asked == [(0.02, 0.95), (0.05, 0.95), (0.1, 0.95), (0.05, 0.9), (0.05, 0.99)]
    for each in decision.sensitivity:
        when_asked = decide(sweep, reroute_tolerance=each.reroute_tolerance, confidence=each.confidence)
        expected = (when_asked.beta_kl, when_asked.kl_temperature) if when_asked.verdict == "choose" else (None, None)
        assert (each.beta_kl, each.kl_temperature) == expected, each
    drifts = [each.drift for each in decision.sensitivity[:3]]
    assert drifts == sorted(drifts, reverse=True), "a looser limit allows no more drift"


def test_trials_stopped_under_the_limit_leave_a_larger_one_unknown(sweep):
    assert not any(each.n_stopped for each in decide(sweep).sensitivity)
    searched = sweep[sweep["beta_kl"] > 0].index
    stopped = sweep.assign(status=sweep["status"].mask(sweep.index == searched[-1], "stopped"))
    assert [each.n_stopped for each in decide(stopped).sensitivity] == [0, 0, 1, 0, 0]


def test_a_rule_that_fired_and_is_not_followed_has_a_sentence_why(sweep):
    decision: Decision = decide(sweep.assign(loss_kl=np.where(sweep["beta_kl"] > 0, 2.0, 0.0)))
    strong, *_ = decision.rules_of_thumb
    assert strong.fired
    assert strong.instead.startswith("what beta_kl 0.3 costs was measured: +0.0")
    assert all(not rule.instead for rule in decision.rules_of_thumb if not rule.fired)


def test_without_a_candidate_the_drift_of_beta_0_is_said():
    decision = decide(make_trials(Surface(always_lost=0.2), searched=14))
    assert decision.verdict == "no_candidate_qualifies"
    assert f"Without KL benign drift is {decision.eval_benign_kl:.2f} nats/token." in decision.reason


def test_both_reports_show_other_limits(make_run: MakeRun, sweep, capsys):
    run = make_run(sweep)
    assert main([str(run)]) == 0
    assert "sure that it loses at most" in " ".join(capsys.readouterr().out.split())
    said = sensitivity_line(decide(sweep))
    pattern = r"If 2 % may be lost: [^;]*; if 10 % may be lost: [^;]*; at P ≥ 0\.9: [^;]*; at P ≥ 0\.99: [^;]*\."
    assert re.fullmatch(pattern, said)
    for name in ("report.md", "report.html"):
        assert said in (run / "report" / name).read_text()


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [
        ("eval_benign_kl", -0.3, "eval_benign_kl -0.3: a divergence must be 0 or more"),
        ("eval_loss_reroute", 1.2, "eval_loss_reroute 1.2: must lie between 0 and 1"),
        ("eval_loss_reroute", -0.1, "eval_loss_reroute -0.1: must lie between 0 and 1"),
    ],
)
def test_values_that_no_training_gives_are_refused_by_name(make_run: MakeRun, sweep, metric, value, said):
    sweep.loc[5, metric] = value
    with pytest.raises(InputError, match=re.escape(f"trials.csv:7: {said}")):
        load_trials(make_run(sweep, clipped=False))
    sweep.loc[5, "status"] = "failed"
    load_trials(make_run(sweep, clipped=False))
