"""What a sweep prints."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from simulated import completed, drive, failed, next_trial, plan_of, tell_baselines, world

from analysis.decide import decide
from sweeps.execution.driver import SweepDriver
from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialOutcome
from sweeps.reporting.console import noise_lines
from sweeps.reporting.events import EventLines
from sweeps.reporting.plan_lines import plan_lines
from sweeps.reporting.summary import summary_lines
from sweeps.storage.run_directory import RunDirectory

TIMES = {"train_s": 3.0, "eval_s": 0.5, "wall_s": 4.0, "ended_at": 5.0, "process": "host:1"}


def measured(spec, process="host:1"):
    """A simulated outcome with the times and the process that a real trial reports."""
    outcome = world(spec)
    outcome.metrics.update(train_s=3.0, eval_s=0.5, wall_s=4.0, ended_at=5.0 * int(spec.trial_id[1:]), process=process)
    return outcome


@pytest.fixture
def finished(quick):
    plan = plan_of(10)
    drive(plan, measured)
    return plan


def test_the_plan_is_printed_with_what_was_dropped():
    plan = plan_of(4, reroute_tolerance=0.025)
    lines = plan_lines(plan.settings, plan.budget, "12 kB of 3 GB free", Path("runs/a"))
    assert lines[0] == "plan      4 trials = 3 baseline + 1 ablation"
    assert "left out for want of trials: confirmation, search, ablation (0.3, T 2)" in " ".join(
        line.strip() for line in lines[1:3]
    )
    assert lines[-4] == "          Gaussian process"
    assert lines[-3] == "subject   rerouting lost ≤ 2.5 % of what the baseline achieves"
    assert lines[-2:] == ["cache     12 kB of 3 GB free", "run       runs/a"]
    assert max(map(len, lines)) <= 80, lines


@pytest.mark.parametrize(
    ("ranges", "search"),
    [
        ({"beta_kl_range": (0.2, 3.5)}, "search    beta_kl 0.2–3.5 (log) × kl_temperature 1–4 · minimise benign drift"),
        (
            {"kl_temperature_range": (2.0, 2.0)},
            "search    beta_kl 0.001–2 (log) at kl_temperature 2 · minimise benign drift",
        ),
        (
            {"beta_kl_range": (0.000123, 123.456), "kl_temperature_range": (1.2345, 4.5678)},
            "search    beta_kl 0.000123–123.456 (log) × kl_temperature 1.2345–4.5678 · minimise benign drift",
        ),
    ],
)
def test_the_plan_says_what_is_searched_and_what_lies_outside(ranges, search):
    plan = plan_of(20, **ranges)
    lines = plan_lines(plan.settings, plan.budget, "off", Path("runs/a"))
    text = " ".join(" ".join(lines).split())
    assert " ".join(search.split()) in text
    assert f"left out as outside the ranges: {', '.join(plan.budget.outside)}" in text
    assert "for want of trials" not in text
    assert max(map(len, lines)) <= 80, lines


def test_a_pick_at_an_end_of_a_range_is_told_with_the_command_that_goes_on(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    settings = PlanSettings(num_samples=6, beta_kl_range=(0.01, 0.1), kl_temperature_range=(1.0, 1.0))
    run.record = {"preset": "qwen3-8b", "config_overrides": {"steps": 90}, "settings": dataclasses.asdict(settings)}
    driver = SweepDriver(run, settings, 1)
    drive(driver._plan, lambda spec: completed(0.01, 9.6 / (1 + spec.beta_kl), **TIMES))
    assert driver.conclude() == 0
    lines = capsys.readouterr().out.splitlines()
    end = "warning   The pick sits at the upper end of the beta_kl range 0.01–0.1: what lies above"
    assert end in " ".join(line.strip() for line in lines), lines
    command = (
        "python sweeps/kl_ablation.py --preset qwen3-8b --num-samples 6 --beta-kl-range 0.01 1.0 "
        "--kl-temperature-range 1.0 1.0 --steps 90"
    )
    assert command in " ".join(" ".join(lines).replace("\\ ", " ").split())
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80, lines


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


def test_the_summary_counts_cost_and_names_the_next_command(finished):
    decision = decide(pd.DataFrame(finished.rows()))
    lines = summary_lines(finished.rows(), decision, 20.0, 2, Path("runs/a b"))
    text = "\n".join(lines)
    assert "10 trials in 20 s · 10 done, 0 failed" in text
    assert "training 30 s = 75% of 20 s × 2 at a time" in text
    assert "overhead 0.50 s a trial, 1.50 s with Ray's hand-over" in text
    assert "python analysis/pick_beta.py 'runs/a b'" in text
    assert max(map(len, lines)) <= 80, lines


def test_overhead_leaves_out_the_first_trial_of_every_process(quick):
    plan = plan_of(4)

    def outcome(spec):
        made = measured(spec, process=f"host:{int(spec.trial_id[1:]) % 2}")
        first = spec.trial_id in ("t000", "t001")
        made.metrics["wall_s"] = 30.0 if first else 4.0
        return made

    drive(plan, outcome)
    text = "\n".join(summary_lines(plan.rows(), decide(pd.DataFrame(plan.rows())), 60.0, 1, Path("runs/a")))
    assert "overhead 0.50 s a trial" in text


@pytest.mark.parametrize(
    ("options", "searches"),
    [
        ({}, "Gaussian process"),
        ({"sampler": "tpe"}, "TPE"),
        ({"sampler": "random"}, "random"),
        ({"num_samples": 300}, "Gaussian process"),
        ({"num_samples": 301, "sampler": "tpe"}, "TPE"),
        (
            {"num_samples": 340},
            "Gaussian process for 300 trials beside the baseline, then TPE: the cost of the former grows with their "
            "cube",
        ),
    ],
)
def test_the_plan_says_what_searches(options, searches):
    plan = plan_of(**{"num_samples": 20, **options})
    lines = plan_lines(plan.settings, plan.budget, "off", Path("runs/a"))
    begin, end = (next(i for i, line in enumerate(lines) if line.startswith(label)) for label in ("search", "subject"))
    assert " ".join(line.strip() for line in lines[begin + 1 : end]) == searches
    assert max(map(len, lines)) <= 80, lines


@pytest.mark.parametrize(
    ("num_samples", "says"),
    [
        (12, "stop      search trials early whose held-out rerouting stays over the limit"),
        (7, "stop      nothing: only search trials are stopped early, and the plan has none"),
    ],
)
def test_the_plan_says_what_is_stopped_early(num_samples, says):
    plan = plan_of(num_samples)
    with_it, without = (plan_lines(plan.settings, plan.budget, "off", Path("a"), early) for early in (True, False))
    assert set(with_it) - set(without) == {says}
    assert len(says) <= 80


def stopped(step: int = 42) -> TrialOutcome:
    reason = f"step {step}: held-out reroute 0.2900 is over 0.1500 (baseline 0.1000), as at step 28"
    metrics = {"steps": step, "train_s": 2.0, "eval_s": 0.5, "wall_s": 3.0, "ended_at": 100.0, "process": "host:1"}
    return TrialOutcome("stopped", 0.02, 0.29, 1.0, metrics, reason)


def test_a_stopped_trial_says_where_and_is_counted_apart(quick, capsys):
    plan = plan_of(10)
    events = EventLines(plan)
    drive(plan, lambda spec: stopped() if spec.trial_id == "t008" else measured(spec))
    events.update(plan.rows())
    line = next(line for line in capsys.readouterr().out.splitlines() if " t008 " in line)
    assert line.endswith("stopped: step 42, reroute 0.2900")
    assert len(line) <= 80
    text = "\n".join(summary_lines(plan.rows(), decide(pd.DataFrame(plan.rows())), 20.0, 2, Path("runs/a")))
    assert "10 trials in 20 s · 9 done, 1 stopped, 0 failed" in text
    assert "training 29 s = 72% of" in text  # 9 times 3 s, and 2 s
    assert "overhead 0.50 s a trial" in text


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


def test_a_baseline_that_never_rerouted_is_told_with_the_knobs_and_without_its_noise(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    driver = SweepDriver(RunDirectory(tmp_path / "run"), plan_of(20, baseline_seeds=3).settings, 1)
    for seed in range(3):
        outcome = completed(0.79 + 0.1 * seed, train_s=3.0, eval_s=0.5, wall_s=4.0, ended_at=5.0, process="host:1")
        driver._plan.tell(next_trial(driver._plan).trial_id, outcome)
    driver._tell_noise()
    assert capsys.readouterr().out == ""
    rows = driver._plan.rows()
    text = " ".join(" ".join(summary_lines(rows, decide(pd.DataFrame(rows)), 20.0, 2, Path("runs/a"))).split())
    assert "verdict baseline_never_rerouted: " in text
    assert "Give rerouting more room: more --steps, a higher --lr, a larger --schedule-horizon." in text


def test_a_sweep_of_settings_that_all_break_behaviour_ends_like_one_without_an_answer(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    settings = PlanSettings(num_samples=6)
    run.record = {"preset": "qwen3-8b", "config_overrides": {}, "settings": dataclasses.asdict(settings)}
    driver = SweepDriver(run, settings, 1)
    drive(driver._plan, lambda spec: completed(0.01, 1 / (1 + spec.beta_kl), 0.6 if spec.beta_kl else 8.0, **TIMES))
    assert driver.conclude() == 3
    assert "verdict   no_setting_behaves" in capsys.readouterr().out
