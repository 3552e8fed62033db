"""What is asked and told is in the storage at once, whole, and never misleads Optuna's model."""

import random
import tempfile
from collections import Counter

import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage
from optuna.trial import TrialState
from simulated import (
    completed,
    drive,
    failed,
    file_storage,
    next_trial,
    plan_of,
    start,
    tell_baselines,
    world,
)

from cbtrain.config import InputError
from sweeps.plan.journal import CONSTRAINT, TrialOutcome, TrialSpec


@pytest.mark.usefixtures("quick")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), concurrent=st.integers(1, 8), baseline=st.sampled_from([0.02, None, 0.95]))
def test_no_trial_is_complete_without_its_constraint_at_any_time(
    seed: int, concurrent: int, baseline: float | None
) -> None:
    storage, draw = InMemoryStorage(), random.Random(seed)
    plan = plan_of(16, storage)

    def checked(spec: TrialSpec) -> TrialOutcome:
        for trial in optuna.load_study(study_name="kl_ablation", storage=storage).trials:
            assert trial.state != TrialState.COMPLETE or CONSTRAINT in trial.constraints, trial
        if spec.phase == "baseline":
            return failed() if baseline is None else completed(baseline)
        return failed() if draw.random() < 0.2 else world(spec)

    drive(plan, checked, concurrent=concurrent, rng=draw)
    rows = {row["trial_id"]: row for row in plan.rows()}
    for trial in optuna.load_study(study_name="kl_ablation", storage=storage).trials:
        row = rows[trial.user_attrs["trial_id"]]
        assert trial.state.is_finished(), trial
        if trial.state == TrialState.COMPLETE:
            # Under "0" is what the dashboard reads.
            assert trial.constraints == dict.fromkeys(("0", CONSTRAINT), row["reroute_regression"])
            assert trial.value == pytest.approx(np.log(row["eval_benign_kl"]))


@pytest.mark.usefixtures("quick")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_samples=st.integers(4, 24))
def test_a_plan_rebuilt_after_every_tell_gives_the_same_trials_and_rows(seed: int, num_samples: int) -> None:
    def outcome(spec: TrialSpec) -> TrialOutcome:
        return failed() if random.Random(f"{seed}{spec.trial_id}").random() < 0.2 else world(spec)

    uninterrupted = plan_of(num_samples, seed=seed)
    expected = drive(uninterrupted, outcome)
    with tempfile.TemporaryDirectory() as folder:
        for index, spec in enumerate(expected):
            plan = plan_of(num_samples, file_storage(folder), seed=seed)
            assert plan.ask() == spec, f"trial {index}"
            if random.Random(f"{seed}{index}").random() < 0.5:
                plan = plan_of(num_samples, file_storage(folder), seed=seed)
                assert plan.ask() == spec, f"trial {index}, asked again"
            plan.tell(spec.trial_id, outcome(spec))
        rebuilt = plan_of(num_samples, file_storage(folder), seed=seed)
        assert rebuilt.done
        assert rebuilt.rows() == uninterrupted.rows()


@pytest.mark.usefixtures("quick")
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), ended=st.integers(0, 19))
def test_a_killed_sweep_keeps_its_results_and_asks_interrupted_trials_first(seed: int, ended: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        plan = plan_of(20, file_storage(folder))
        running: list[TrialSpec] = []
        for _ in range(ended):
            start(plan, running, 4)
            spec = running.pop(draw.randrange(len(running)))
            plan.tell(spec.trial_id, world(spec))
        rebuilt = plan_of(20, file_storage(folder))
        assert rebuilt.rows() == plan.rows()
        assert [rebuilt.ask() for _ in running] == sorted(running, key=lambda spec: spec.trial_id)
        for spec in running:
            rebuilt.tell(spec.trial_id, world(spec))
        drive(rebuilt)
        ids = [row["trial_id"] for row in rebuilt.rows()]
        assert ids == [f"t{index:03d}" for index in range(20)], ids
        assert {row["status"] for row in rebuilt.rows()} == {"completed"}


@pytest.mark.usefixtures("quick")
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), num_samples=st.integers(8, 24))
def test_rebuilt_after_tells_at_random_with_four_at_a_time_every_trial_runs_once(seed: int, num_samples: int) -> None:
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        plan, running, told = plan_of(num_samples, file_storage(folder)), list[TrialSpec](), list[TrialSpec]()
        while not plan.done:
            start(plan, running, 4)
            spec = running.pop(draw.randrange(len(running)))
            plan.tell(spec.trial_id, failed() if draw.random() < 0.2 and spec.trial_id != "t000" else world(spec))
            told.append(spec)
            if draw.random() < 0.5:
                plan = plan_of(num_samples, file_storage(folder))
                again = [plan.ask() for _ in running]
                assert again == sorted(running, key=lambda spec: spec.trial_id)
        phases, budget = Counter(spec.phase for spec in told), plan.budget
        assert sorted(spec.trial_id for spec in told) == [f"t{index:03d}" for index in range(num_samples)]
        assert (phases["baseline"], phases["ablation"]) == (budget.baseline, budget.ablation)
        assert phases["search"] + phases["confirm"] == budget.search + budget.confirm


@pytest.mark.usefixtures("quick")
def test_a_sweep_that_grows_keeps_its_baselines_and_spends_the_new_total() -> None:
    storage = InMemoryStorage()
    before = drive(plan_of(20, storage))
    grown = plan_of(40, storage)
    after = drive(grown)
    phases = Counter(spec.phase for spec in [*before, *after])
    assert phases == {"baseline": 4, "ablation": 4, "search": 28, "confirm": 4}, phases
    assert [spec.trial_id for spec in after] == [f"t{index:03d}" for index in range(20, 40)]


def test_a_journal_is_continued_with_the_settings_it_was_begun_with() -> None:
    storage = InMemoryStorage()
    plan = plan_of(10, storage, reroute_tolerance=0.1)
    tell_baselines(plan, 0.02)
    other = r"the journal holds a sweep with reroute_tolerance 0.1, not 0.05: continue it as it was, or start another"
    with pytest.raises(InputError, match=other):
        plan_of(10, storage)
    with pytest.raises(InputError, match="baseline_seeds 3, not 5"):
        plan_of(10, storage, reroute_tolerance=0.1, baseline_seeds=5)
    assert plan_of(12, storage, reroute_tolerance=0.1).rows() == plan.rows()


def test_optuna_learns_of_a_stopped_trial_that_its_place_is_infeasible() -> None:
    storage = InMemoryStorage()
    plan = plan_of(10, storage)
    tell_baselines(plan, 0.01, 0.01, 0.01)
    spec = next_trial(plan)
    plan.tell(spec.trial_id, TrialOutcome("stopped", 0.001, 0.5, 1.0, error="step 30: over the limit"))
    told = optuna.load_study(study_name="kl_ablation", storage=storage).trials[0]
    assert (told.state, told.constraints[CONSTRAINT] > 0) == (TrialState.PRUNED, True)
    assert (plan.rows()[3]["status"], plan.rows()[3]["feasible"]) == ("stopped", None)


@pytest.mark.filterwarnings("error")
def test_a_sweep_killed_between_constraint_and_tell_is_settled_when_rebuilt() -> None:
    storage = InMemoryStorage()
    plan = plan_of(10, storage)
    tell_baselines(plan, 0.01, 0.01, 0.01)
    spec = next_trial(plan)
    entry = plan._entries[spec.trial_id]
    plan._journal.record(entry, completed(0.02))
    entry.trial.set_constraint(CONSTRAINT, -0.04)
    rebuilt = plan_of(10, storage)
    told = optuna.load_study(study_name="kl_ablation", storage=storage).trials[0]
    assert (told.state, told.constraints[CONSTRAINT]) == (TrialState.COMPLETE, -0.04)
    assert rebuilt.rows()[3]["status"] == "completed"


def test_trials_that_another_tool_put_into_the_study_are_left_alone() -> None:
    storage = InMemoryStorage()
    plan = plan_of(10, storage)
    tell_baselines(plan, 0.01, 0.01)
    optuna.load_study(study_name="kl_ablation", storage=storage).enqueue_trial({"beta_kl": 1.0})
    rebuilt = plan_of(10, storage)
    assert rebuilt.rows() == plan.rows()
    assert rebuilt.ask() == TrialSpec("t002", "baseline", 0.0, 1.0, 2)


def test_trials_that_failed_run_again_under_their_ids_and_what_they_were_is_forgotten(tmp_path) -> None:
    plan = plan_of(8, file_storage(tmp_path))
    bad = {"t001": failed("broken"), "t004": failed("NonFiniteLossError: loss nan at step 3")}
    drive(plan, lambda spec: bad.get(spec.trial_id) or world(spec))
    assert plan.done
    again = plan_of(8, file_storage(tmp_path))
    again.retry_failed()
    assert not again.done
    third = plan_of(8, file_storage(tmp_path))  # killed before it was asked for
    assert [spec.trial_id for spec in drive(third, world)] == ["t001"]
    rows = plan_of(8, file_storage(tmp_path)).rows()
    assert [row["trial_id"] for row in rows] == [f"t{index:03d}" for index in range(8)]
    assert {row["trial_id"]: row["status"] for row in rows if row["status"] != "completed"} == {"t004": "failed"}
