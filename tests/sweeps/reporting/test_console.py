"""What a sweep says while it runs: events, and what the noise of its baseline asks for."""

import pytest
from simulated import completed, drive, failed, next_trial, plan_of, tell_baselines, world

from sweeps.execution.driver import SweepDriver
from sweeps.plan.journal import TrialOutcome
from sweeps.reporting.console import noise_lines
from sweeps.reporting.events import EventLines
from sweeps.storage.run_directory import RunDirectory


@pytest.fixture
def finished(quick):
    plan = plan_of(10)
    drive(plan, world)
    return plan


def test_each_event_is_printed_once(quick, capsys):
    plan = plan_of(4)
    events = EventLines(plan)
    for _ in range(3):
        spec = next_trial(plan)
        events.update(plan.rows())
        plan.tell(spec.trial_id, completed(0.01, 9.6))
        events.update(plan.rows())
        events.update(plan.rows())
    spec = next_trial(plan)
    plan.tell(spec.trial_id, failed("CUDA out of memory: " + "so many GiB, " * 9))
    events.update(plan.rows())
    lines = capsys.readouterr().out.splitlines()[1:]
    assert len(lines) == 7, lines
    assert [line.split()[1] for line in lines] == ["t000", "t000", "t001", "t001", "t002", "t002", "t003"]
    assert "failed: CUDA out of mem" in lines[-1]
    assert lines[-1].endswith("… (logs/t003.log)")
    assert len(lines[-1]) <= 80


def test_a_trial_over_the_limit_says_so(finished, capsys):
    EventLines(finished).update(finished.rows())
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines()[1:]}
    for row in finished.rows():
        if row["phase"] != "baseline":
            assert lines[row["trial_id"]].endswith("ok" if row["feasible"] else "over"), lines[row["trial_id"]]
            assert f"{row['reroute_regression'] + finished.tolerance:+.3f}" in lines[row["trial_id"]]
    assert max(map(len, lines.values())) <= 80


def stopped(step: int = 42) -> TrialOutcome:
    reason = f"step {step}: held-out reroute 0.2900 is over 0.1500 (baseline 0.1000), as at step 28"
    metrics = {"steps": step, "train_s": 2.0, "eval_s": 0.5, "wall_s": 3.0, "ended_at": 100.0, "process": "host:1"}
    return TrialOutcome("stopped", 0.02, 0.29, 1.0, metrics, reason)


def test_a_stopped_trial_says_where(quick, capsys):
    plan = plan_of(10)
    events = EventLines(plan)
    drive(plan, lambda spec: stopped() if spec.trial_id == "t008" else world(spec))
    events.update(plan.rows())
    line = next(line for line in capsys.readouterr().out.splitlines() if " t008 " in line)
    assert line.endswith("stopped: step 42, reroute 0.2900")
    assert len(line) <= 80


def noise_of(losses: list[float], limit: float, **options: object) -> str:
    plan = plan_of(20, baseline_seeds=max(3, len(losses)), **options)
    tell_baselines(plan, *losses)
    lines = noise_lines(plan.rows(), limit, plan.settings)
    assert all(len(line) <= 80 for line in lines), lines
    return " ".join(line.strip() for line in lines)


def test_seeds_that_differ_too_much_for_the_limit_are_told_with_what_would_help():
    # σ of (0, 0.031, 0.062) is 0.031; 12.4 (0.031 / 0.049)² = 4.96 seeds.
    expected = (
        "noise     σ 0.031 between seeds is 63 % of the limit 0.049: an answer may need up to 5 seeds a setting "
        "(another sweep, --num-samples 30 --baseline-seeds 5)"
    )
    again = "; settings that ran are repeated where a new one is worth no more"
    assert noise_of([0.0, 0.031, 0.062], 0.049) == expected + again
    assert noise_of([0.0, 0.031, 0.062], 0.049, sampler="tpe") == expected
    enough = [0.0, 0.031, 0.062, 0.0, 0.062]
    assert "(--num-samples 30)" in noise_of(enough, 0.049), "its baseline has seeds enough"
    plan = plan_of(30, baseline_seeds=5)
    tell_baselines(plan, *enough)
    assert "--num-samples" not in " ".join(noise_lines(plan.rows(), 0.049, plan.settings)), "it has as many"


def test_seeds_that_agree_or_are_too_few_are_not_told():
    assert noise_of([0.010, 0.012, 0.011], 0.049) == ""
    assert noise_of([0.0, 0.0195, 0.039], 0.049) == "", "σ 0.0195 is less than 0.4 of the limit"
    assert noise_of([0.0, 0.02, 0.04], 0.049) != ""
    plan = plan_of(20, baseline_seeds=3)
    tell_baselines(plan, 0.0, 0.2, None)
    assert noise_lines(plan.rows(), 0.049, plan.settings) == []


def test_a_baseline_seed_that_failed_is_told_by_itself_and_is_no_noise():
    said = noise_of([0.010, 0.9, 0.011], 0.049)
    assert "1 of 3 baseline seeds never rerouted as the others did (t001, seed 1: reroute 0.9)" in said
    assert "noise" not in said


def test_noise_is_told_once_as_soon_as_the_baseline_is_in_and_again_when_resumed(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    driver = SweepDriver(run, plan_of(20, baseline_seeds=3).settings, 1)
    told = []
    for loss in (0.0, 0.05, 0.1, 0.3):
        driver._tell_noise()
        told.append(capsys.readouterr().out)
        driver._plan.tell(next_trial(driver._plan).trial_id, completed(loss))
    driver._tell_noise()
    assert told == ["", "", "", told[3]]
    assert told[3].startswith("noise     σ 0.05 between seeds is ")
    assert capsys.readouterr().out == ""
    SweepDriver(run, driver.settings, 1)._tell_noise()
    assert capsys.readouterr().out == told[3]
