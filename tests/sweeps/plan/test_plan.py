"""The plan: order, pairing, exact budgets, the constraint, and that nothing is lost when it is rebuilt."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from simulated import (
    BASELINE_LOSS,
    completed,
    drive,
    failed,
    next_trial,
    plan_of,
    quick_suggest,
    start,
    tell_baselines,
    true_reroute,
    world,
)

import sweeps.plan.plan
from analysis.decide import decide
from sweeps.plan.budget import ABLATION_POINTS
from sweeps.plan.journal import TrialOutcome, TrialSpec


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("num_samples", range(4, 61))
def test_every_budget_is_spent_exactly_whatever_fails(num_samples: int) -> None:
    draw = random.Random(num_samples)
    plan = plan_of(num_samples)
    asked = drive(
        plan,
        lambda spec: world(spec) if spec.trial_id == "t000" or draw.random() > 0.2 else failed(),
        concurrent=draw.randint(1, 6),
        rng=draw,
    )
    counts = Counter(spec.phase for spec in asked)
    budget = plan.budget
    assert [spec.trial_id for spec in asked] == [f"t{index:03d}" for index in range(num_samples)]
    assert (counts["baseline"], counts["ablation"]) == (budget.baseline, budget.ablation)
    assert counts["search"] + counts["confirm"] == budget.search + budget.confirm
    assert len(plan.rows()) == num_samples
    assert plan.ask() is None


@pytest.mark.usefixtures("quick")
def test_phases_follow_one_another_with_paired_seeds() -> None:
    asked = drive(plan_of(20, seed=7), lambda spec: world(spec, noise=0))
    assert [spec.phase for spec in asked] == ["baseline"] * 4 + ["ablation"] * 4 + ["search"] * 10 + ["confirm"] * 2
    assert [(s.beta_kl, s.kl_temperature, s.seed) for s in asked[:4]] == [(0, 1, seed) for seed in (7, 8, 9, 10)]
    assert [(s.beta_kl, s.kl_temperature) for s in asked[4:8]] == list(ABLATION_POINTS)
    assert {s.seed for s in asked[4:8]} == {7}
    assert [s.seed for s in asked[8:18]] == [7, 8, 9, 10, 7, 8, 9, 10, 7, 8]
    assert len({(s.beta_kl, s.kl_temperature, s.seed) for s in asked}) == 20


@pytest.mark.usefixtures("quick")
def test_ablation_starts_beside_the_baseline_but_search_waits_for_both() -> None:
    plan = plan_of(20)
    asked = [next_trial(plan) for _ in range(8)]
    assert [spec.phase for spec in asked] == ["baseline"] * 4 + ["ablation"] * 4
    for spec in (*asked[4:7], *asked[:3]):
        assert plan.ask() is None, "a search trial was given before the baseline was in"
        assert plan.tolerance is None
        plan.tell(spec.trial_id, world(spec))
    plan.tell("t003", failed())
    assert plan.ask() is None, "a search trial was given before the ablation was in"
    plan.tell("t007", world(asked[7]))
    assert next_trial(plan).phase == "search"


@pytest.mark.usefixtures("quick")
def test_the_fewer_trials_the_search_has_left_the_fewer_of_them_run_at_a_time() -> None:
    plan = plan_of(20)
    for spec in start(plan, [], 8):
        plan.tell(spec.trial_id, world(spec))
    running: list[TrialSpec] = []
    beside: list[int] = []
    while len(beside) < plan.budget.search:
        while len(beside) < plan.budget.search and (spec := plan.ask()) is not None:
            beside.append(len(running))
            running.append(spec)
        spec = running.pop(0)
        plan.tell(spec.trial_id, world(spec))
    assert beside == [0, 1, 2, 3, 2, 2, 1, 1, 0, 0], beside


@pytest.mark.usefixtures("quick")
def test_tolerance_is_a_share_of_what_the_baseline_achieved_and_pairs_by_seed() -> None:
    plan = plan_of(10, reroute_tolerance=0.1)
    tell_baselines(plan, 0.02, 0.10, 0.06)
    tolerance = 0.1 * (1 - 0.06)
    assert plan.tolerance == pytest.approx(tolerance)
    spec = next_trial(plan)
    plan.tell(spec.trial_id, completed(0.08))
    rows = plan.rows()
    assert [row["reroute_regression"] for row in rows[:3]] == pytest.approx([-tolerance] * 3)
    assert rows[3]["reroute_regression"] == pytest.approx(0.08 - 0.02 - tolerance)
    assert [row["feasible"] for row in rows] == [True] * 4


@pytest.mark.usefixtures("quick")
def test_a_seed_whose_baseline_failed_is_compared_with_the_mean_and_left_out_of_the_search() -> None:
    plan = plan_of(20)
    tell_baselines(plan, None, 0.02, 0.04, 0.06)
    rest = drive(plan, lambda spec: completed(0.05))
    rows = {row["trial_id"]: row for row in plan.rows()}
    tolerance = 0.05 * (1 - 0.04)
    assert rows["t004"]["seed"] == 0
    assert rows["t004"]["reroute_regression"] == pytest.approx(0.05 - 0.04 - tolerance)
    assert {spec.seed for spec in rest if spec.phase in ("search", "confirm")} <= {1, 2, 3}
    assert len(rows) == 20


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("loss", "reason"), [(0.95, "baseline_never_rerouted"), (None, "baseline_failed"), (0.79, "")])
def test_a_useless_baseline_ends_the_sweep_once_running_trials_have_ended(loss: float | None, reason: str) -> None:
    plan = plan_of(10)
    asked = [next_trial(plan) for _ in range(5)]
    for spec in asked[:3]:
        plan.tell(spec.trial_id, failed() if loss is None else completed(loss))
    assert plan.stopped_because == reason
    assert (plan.ask() is None) == bool(reason)
    assert not plan.done
    for spec in asked[3:]:
        plan.tell(spec.trial_id, completed(0.99))
    assert plan.done == bool(reason)
    assert (plan.tolerance is None) == (loss is None)


@pytest.mark.usefixtures("quick")
def test_two_seeds_ahead_that_failed_to_reroute_end_nothing_where_another_did_reroute() -> None:
    plan = plan_of(20, baseline_seeds=5)
    asked = [next_trial(plan) for _ in range(5)]
    for spec, loss in zip(asked[::-1], (0.02, 0.01, 0.015, 0.83, 0.82), strict=True):
        plan.tell(spec.trial_id, completed(loss))
    assert plan.stopped_because == ""
    assert (next_trial(plan).phase, asked[2].seed) == ("ablation", 2)


def test_of_a_baseline_that_failed_at_half_its_seeds_nothing_is_swept() -> None:
    plan = plan_of(20)
    tell_baselines(plan, 0.02, 0.01, 0.83, 0.82)
    assert plan.stopped_because == "baseline_never_rerouted"
    assert plan.ask() is None


def test_no_trial_runs_on_a_seed_whose_baseline_failed_nor_is_compared_with_it() -> None:
    plan = plan_of(20)
    tell_baselines(plan, 0.97, 0.01, 0.012, 0.014)
    assert plan.tolerance == pytest.approx(0.05 * (1 - 0.012))
    asked = drive(plan)
    assert 0 not in {spec.seed for spec in asked if spec.beta_kl > 0}


def test_a_setting_whose_only_trial_failed_is_repeated_on_another_seed() -> None:
    plan = plan_of(20)

    def outcome(spec: TrialSpec) -> TrialOutcome:
        return completed(0.97, 0.01) if spec.trial_id == "t005" else world(spec)

    asked = drive(plan, outcome)
    failed_there = next(spec for spec in asked if spec.trial_id == "t005")
    setting = (failed_there.beta_kl, failed_there.kl_temperature)
    again = [spec for spec in asked if (spec.beta_kl, spec.kl_temperature) == setting]
    assert len(again) == 2
    assert again[1].seed != failed_there.seed
    assert asked.index(again[1]) <= 10, "a second trial there tells more than new points"


def bad(**changes: float | None) -> TrialOutcome:
    values: dict = {"eval_benign_kl": 1.0, "eval_loss_reroute": 0.1, "eval_harmful_nll": 1.0} | changes
    metrics = {name: values.pop(name) for name in list(values) if not name.startswith("eval_")}
    return TrialOutcome("completed", **values, metrics=metrics)


@pytest.mark.parametrize(
    ("outcome", "error"),
    [
        (bad(eval_benign_kl=float("nan")), "eval_benign_kl is nan, not a finite number"),
        (bad(eval_loss_reroute=np.float32("inf")), "eval_loss_reroute is inf, not a finite number"),
        (bad(eval_harmful_nll=None), "eval_harmful_nll is missing"),
        (bad(loss_retain=float("nan")), "loss_retain is nan, not a finite number"),
    ],
)
def test_a_completed_trial_without_its_numbers_is_failed_by_name(outcome: TrialOutcome, error: str) -> None:
    plan = plan_of(10)
    plan.ask()
    plan.tell("t000", outcome)
    row = plan.rows()[0]
    assert (row["status"], row["error"], row["feasible"]) == ("failed", error, None)


def test_a_trial_is_told_once_and_only_if_it_was_asked() -> None:
    plan = plan_of(10)
    plan.ask()
    plan.tell("t000", completed(0.01))
    with pytest.raises(ValueError, match="t000: told twice"):
        plan.tell("t000", completed(0.01))
    with pytest.raises(KeyError):
        plan.tell("t001", completed(0.01))


def assessed(beta_kl: float, probability: float, drift: float) -> SimpleNamespace:
    ran = {"n_seeds": 1, "n_failed": 0}
    return SimpleNamespace(beta_kl=beta_kl, kl_temperature=1.0, probability_feasible=probability, drift=drift, **ran)


def confirmations(
    monkeypatch: pytest.MonkeyPatch, assessments: list[list[SimpleNamespace]], **options: object
) -> tuple[list[tuple[str, float, int]], list[int]]:
    """The last trials of a sweep as (phase, beta_kl, seed) under scripted decisions, and the rows each one saw."""
    seen: list[int] = []
    script = iter(assessments)

    def scripted(trials: pd.DataFrame, **_: float) -> SimpleNamespace:
        seen.append(int((trials.status == "completed").sum()))
        return SimpleNamespace(settings=next(script))

    monkeypatch.setattr(sweeps.plan.plan, "suggest", quick_suggest)
    monkeypatch.setattr(sweeps.plan.plan, "decide", scripted)
    asked = drive(plan_of(20, **options), concurrent=4)
    return [(spec.phase, spec.beta_kl, spec.seed) for spec in asked[-2:]], seen


def test_the_pick_is_confirmed_on_baseline_seeds_it_has_not_had_refitted_after_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranking = [assessed(0.3, 0.96, 0.8), assessed(0.1, 0.99, 2.0), assessed(0.5, 0.6, 0.1)]
    trials, seen = confirmations(monkeypatch, [ranking, ranking])
    assert trials == [("confirm", 0.3, 1), ("confirm", 0.3, 2)]
    assert seen == [18, 18], "beside each other, when all others have ended"


def test_a_pick_that_falls_below_the_confidence_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    before = [assessed(0.3, 0.96, 0.8), assessed(0.1, 0.99, 2.0)]
    after = [assessed(0.1, 0.99, 2.0), assessed(0.3, 0.80, 0.8)]
    trials, _ = confirmations(monkeypatch, [before, after])
    assert trials == [("confirm", 0.3, 1), ("confirm", 0.1, 1)]


def test_without_a_pick_the_first_of_the_other_settings_is_replicated(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = [assessed(0.1, 0.9, 2.0), assessed(0.3, 0.5, 0.8)]
    trials, _ = confirmations(monkeypatch, [ranking, ranking])
    assert trials == [("confirm", 0.1, 1), ("confirm", 0.1, 2)]


def test_with_nothing_to_confirm_the_search_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    trials, _ = confirmations(monkeypatch, [[], []])
    assert [phase for phase, _, _ in trials] == ["search", "search"]


def test_a_pick_that_had_every_baseline_seed_is_confirmed_on_fresh_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking = [assessed(0.1, 0.99, 2.0)]
    trials, _ = confirmations(monkeypatch, [ranking, ranking], baseline_seeds=1)
    assert trials == [("confirm", 0.1, 1), ("confirm", 0.1, 2)]


@pytest.mark.parametrize("concurrent", [1, 4])
def test_a_sweep_of_twenty_finds_a_setting_that_may_be_shipped(concurrent: int) -> None:
    plan = plan_of(20)
    drive(plan, concurrent=concurrent)
    decision = decide(pd.DataFrame(plan.rows()), reroute_tolerance=0.05, confidence=0.95)
    assert decision.verdict == "choose", decision
    lost = true_reroute(decision.beta_kl, decision.kl_temperature) - BASELINE_LOSS
    assert lost <= 0.05 * (1 - BASELINE_LOSS), f"{lost:.4f} truly lost at {decision.beta_kl}"
    assert decision.eval_benign_kl < 4, decision


def test_the_plan_needs_neither_ray_nor_torch_to_be_imported() -> None:
    code = "import sys, sweeps.plan.plan; print(sorted({'ray', 'torch'} & set(sys.modules)))"
    root = Path(sweeps.plan.plan.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
