"""Sweeps that go wrong, from the plan to the verdict, each with what its reader is told."""

import math

import pytest
from simulated import BASELINE_LOSS, completed, drive, failed, plan_of, world

from analysis.decide import decide
from analysis.decision import Decision
from cbtrain.config import InputError
from sweeps.plan.journal import TrialOutcome, TrialSpec
from sweeps.plan.plan import SweepPlan


def verdict(plan: SweepPlan) -> Decision:
    return decide(plan.table(), reroute_tolerance=0.05, confidence=0.95)


def errors(plan: SweepPlan) -> set[str]:
    return {str(row["error"]) for row in plan.rows() if row["status"] == "failed"}


def baseline_else(spec: TrialSpec, outcome: TrialOutcome) -> TrialOutcome:
    return world(spec) if spec.phase == "baseline" else outcome


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (completed(math.nan), "eval_loss_reroute is nan, not a finite number"),
        (TrialOutcome("completed", 1.0, 0.1), "eval_harmful_nll is missing"),
        (failed("its process was lost (killed, or out of memory)"), "its process was lost (killed, or out of memory)"),
    ],
    ids=["NaN", "missing metric", "crash"],
)
def test_trials_that_all_end_without_their_numbers_leave_only_the_baseline(outcome: TrialOutcome, error: str) -> None:
    plan = plan_of(12)
    asked = drive(plan, lambda spec: baseline_else(spec, outcome), concurrent=2)
    decision = verdict(plan)
    assert len(asked) == 12
    assert errors(plan) == {error}
    assert (decision.verdict, decision.reason) == ("insufficient_evidence", "No trial with beta_kl > 0 completed.")
    assert decision.needed is not None


def test_when_every_trial_fails_the_sweep_ends_with_the_first_error() -> None:
    plan = plan_of(12)
    asked = drive(plan, lambda _: failed("CUDA out of memory"))
    decision = verdict(plan)
    assert len(asked) == 3, "no trial is spent where there is nothing to compare with"
    assert plan.stopped_because == "baseline_failed"
    assert decision.verdict == "baseline_failed"
    assert "3 failed (CUDA out of memory)" in decision.reason


def test_when_every_setting_is_infeasible_no_kl_is_recommended() -> None:
    plan = plan_of(20)
    drive(plan, lambda spec: baseline_else(spec, completed(0.4 + 0.01 * (spec.seed % 3), 0.5)), concurrent=2)
    decision = verdict(plan)
    assert {row["feasible"] for row in plan.rows() if row["phase"] != "baseline"} == {False}
    assert (decision.verdict, decision.beta_kl) == ("no_candidate_qualifies", 0.0)
    over = "Every beta_kl from 0.001 to 2 costs more rerouting than the limit allows, at kl_temperature 1–4."
    assert decision.reason == f"{over} Without KL benign drift is {decision.eval_benign_kl:.2f} nats/token."


def test_a_single_trial_beside_the_baseline_is_compared_and_what_was_left_out_is_named() -> None:
    plan = plan_of(2, baseline_seeds=1)
    asked = drive(plan, lambda spec: completed(BASELINE_LOSS, 9.0 if spec.beta_kl == 0 else 1.0))
    decision = verdict(plan)
    assert [(spec.phase, spec.beta_kl) for spec in asked] == [("baseline", 0.0), ("ablation", 0.1)]
    assert plan.budget.dropped == (
        "confirmation",
        "search",
        "ablation (0.3, T 2)",
        "ablation (0.5, T 1)",
        "ablation (0.3, T 1)",
    )
    assert decision.verdict == "choose", decision.reason
    assert any("The baseline ran on one seed" in warning for warning in decision.warnings), decision.warnings


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_budget_without_a_trial_to_compare_is_refused_with_the_arithmetic(num_samples: int) -> None:
    line = rf"--num-samples {num_samples}: 3 baseline seeds \+ 1 trial to compare = 4 at least; give 4 or more"
    with pytest.raises(InputError, match=line):
        plan_of(num_samples)


def test_a_metric_that_only_the_baseline_lacks_does_not_hide_the_others() -> None:
    plan = plan_of(10)
    drive(plan, lambda spec: completed(math.inf) if spec.trial_id == "t001" else world(spec))
    assert errors(plan) == {"eval_loss_reroute is inf, not a finite number"}
    decision = verdict(plan)
    assert decision.baseline is not None
    assert decision.baseline.n_seeds == 2
