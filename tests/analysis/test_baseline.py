"""A baseline that had not converged is no noise, and one that never rerouted names what held it."""

import json
from pathlib import Path

import pandas as pd
import pytest
from synthetic import MakeRun, Surface, make_trials

from analysis.decide import decide
from analysis.pick_beta import write_report
from analysis.report.commands import sweep_command
from analysis.report.wording import explanation

SWEEP = {"preset": "auto", "settings": {"num_samples": 18}, "config": {"steps": 60}, "config_overrides": {"lr": 1e-3}}


@pytest.fixture
def one_late() -> pd.DataFrame:
    """Four baseline seeds, of which the third has one layer that never collapsed; as on a real pretrained model."""
    return late("t002")


def late(*trial_ids: str) -> pd.DataFrame:
    trials = make_trials(Surface())
    trials["steps"] = 60.0
    trials["converged"] = 1.0
    trials["eval_cosine_layer_10"], trials["eval_cosine_layer_20"] = -0.2, -0.1
    trials["collapse_step_layer_10"], trials["collapse_step_layer_20"] = 40.0, 20.0
    held = trials["trial_id"].isin(trial_ids)
    trials.loc[held, ["eval_loss_reroute", "converged", "eval_cosine_layer_10"]] = [0.498, 0.0, 0.98]
    trials.loc[held, "collapse_step_layer_10"] = float("nan")
    return trials


def test_one_baseline_seed_that_failed_is_named_and_the_others_are_compared_with(one_late):
    decision, sound = decide(one_late), decide(make_trials(Surface()))
    assert decision.verdict == "choose"
    assert (decision.beta_kl, decision.kl_temperature) == (sound.beta_kl, sound.kl_temperature)
    assert decision.baseline is not None
    assert (decision.baseline.n_seeds, decision.baseline.n_failed) == (3, 1)
    assert decision.baseline.eval_loss_reroute < 0.05
    assert any(
        warning.startswith("1 of 4 baseline seeds had not converged after 60 steps (t002, seed 2: layer 10 at cosine")
        for warning in decision.warnings
    ), decision.warnings
    (suspect,) = decision.suspects
    assert (suspect.trial_id, suspect.seed) == ("t002", 2)
    assert "layer 10 at cosine 0.98; logs/t002.log" in suspect.evidence


def test_unconverged_seeds_are_said_with_the_steps_they_need_and_no_number_of_seeds():
    one_late = late("t000", "t002")
    decision = decide(one_late)
    assert decision.verdict == "baseline_never_rerouted"
    assert decision.reason.startswith(
        "2 of 4 baseline seeds had not converged after 60 steps (t000, seed 0: layer 10 at cosine 0.98; t002, seed 2: "
    )
    assert "--steps must grow from 60 to about 120" in decision.reason
    assert decision.needed is None
    assert decision.reason not in decision.warnings
    assert "seeds of baseline and setting" not in explanation(decision)
    command = sweep_command(decision, SWEEP, len(one_late))
    assert command is not None
    assert "--steps 120" in command
    assert "--lr 0.001" in command


def test_the_report_says_it_too(make_run: MakeRun):
    run = make_run(late("t000", "t002"))
    write_report(run)
    record = json.loads(Path(run, "report", "decision.json").read_text())
    assert "had not converged" in record["explanation"]
    assert "--steps 120" in record["sweep_command"]


def test_the_same_spread_of_converged_seeds_is_noise(one_late):
    decision = decide(one_late.assign(converged=1.0, eval_cosine_layer_10=-0.2))
    assert "converged" not in decision.reason
    assert decision.mend == {}


def test_a_seed_at_which_nothing_had_begun_says_converged_and_is_not(one_late):
    late = one_late["trial_id"] == "t002"
    one_late.loc[late, ["eval_loss_reroute", "converged"]] = [0.985, 1.0]
    one_late.loc[late, ["eval_cosine_layer_10", "eval_cosine_layer_20"]] = 0.985
    decision = decide(one_late)
    said = "(t002, seed 2: layer 10 at cosine 0.98 and layer 20 at cosine 0.98)"
    assert any(said in warning and "to about 120" in warning for warning in decision.warnings), decision.warnings


def test_a_choice_that_stands_all_the_same_warns_of_it(trials: pd.DataFrame):
    trials = trials.assign(converged=1.0, eval_cosine_layer_1=0.1)
    trials.loc[trials["trial_id"] == "t001", "converged"] = 0.0
    decision = decide(trials)
    assert decision.verdict == "choose"
    assert any("t001, seed 1: still falling at its end" in warning for warning in decision.warnings)
    assert any("from 70 to about 110" in warning for warning in decision.warnings)


def never(reroute: float, retain: float, cosine: float) -> pd.DataFrame:
    """A baseline whose layers stand still."""
    trials = make_trials(Surface(), baselines=3, searched=0).iloc[:3].copy()
    trials["eval_loss_reroute"], trials["converged"] = 0.9999, 1.0
    for layer, norm in ((10, 139.0), (20, 224.0)):
        trials[f"eval_cosine_layer_{layer}"], trials[f"base_norm_layer_{layer}"] = 0.9999, norm
    trials["grad_norm_reroute"], trials["grad_norm_retain"], trials["grad_cosine_reroute"] = reroute, retain, cosine
    return trials


@pytest.mark.parametrize(
    ("gradients", "trained", "said", "flag"),
    [
        ((0.5, 0.5, -0.98), {}, "The retain term holds layers 10, 20 where they are", "--retain-norm relative"),
        ((0.5, 0.5, -0.98), {"retain_norm": "relative", "retain_scale": 10.0}, "holds", "--retain-scale 3.3"),
        ((0.0067, 0.72, -0.47), {"retain_norm": "relative", "retain_scale": 3.0}, "holds", "--retain-scale 1"),
        ((0.0037, 28.0, 0.07), {}, "The retain term holds layers 10, 20 where they are", "--retain-norm relative"),
        ((0.5, 0.01, -0.1), {"lr": 1e-4}, "Nothing holds the rerouting back", "--lr 0.0003"),
    ],
)
def test_what_held_the_rerouting_is_named_with_the_one_flag_that_helps(gradients, trained, said, flag):
    decision = decide(never(*gradients), trained=trained)
    assert decision.verdict == "baseline_never_rerouted"
    assert said in decision.reason
    assert f"Try {flag}." in decision.reason
    command = sweep_command(decision, SWEEP, 3)
    assert command is not None
    assert flag in command
    if "relative" in flag:
        assert "139 at layer 10 and 224 at layer 20" in decision.reason


def test_a_baseline_that_logged_no_gradients_gets_the_general_advice():
    trials = never(0.5, 0.5, -0.98).drop(columns=["grad_norm_reroute"])
    assert "Give rerouting more room" in explanation(decide(trials))
