"""What a sweep says at its end."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
from simulated import completed, drive, failed, next_trial, plan_of, world

from analysis.decide import decide
from analysis.decision import Decision
from analysis.report.commands import Commands, commands_after
from sweeps.execution.driver import SweepDriver
from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialOutcome
from sweeps.plan.plan import SweepPlan
from sweeps.reporting.summary import stopped_lines, summary_lines
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


def summary_of(plan: SweepPlan, wall_s: float = 20.0, concurrency: int = 2, **options: object) -> list[str]:
    rows, run_dir = plan.rows(), Path("runs/a b")
    decision = decide(pd.DataFrame(rows))
    sweep = {"run_dir": str(run_dir), "settings": dataclasses.asdict(plan.settings)}
    commands = commands_after(decision, sweep, pd.DataFrame(rows), run_dir)
    lines = summary_lines(
        rows, decision, wall_s, concurrency, run_dir, total=plan.budget.total, commands=commands, **options
    )
    assert max(map(len, lines)) <= 80, lines
    return lines


def test_the_summary_begins_with_a_badge_and_says_cost_and_the_next_command(finished):
    lines = summary_of(finished)
    assert lines[0] == "finished · 10 of 10 trials in 20 s · 0 failed"
    assert "cost      training 30 s = 75 % of 20 s × 2 at a time · overhead 1.50 s a trial" in lines
    assert any("python analysis/pick_beta.py 'runs/a b'" in line for line in lines)
    assert lines[-1] == "explore   optuna-dashboard 'runs/a b'/study.log"


def test_overhead_leaves_out_the_first_trial_of_every_process(quick):
    plan = plan_of(4)

    def outcome(spec):
        return measured(spec, process=f"host:{int(spec.trial_id[1:]) % 2}")

    drive(plan, outcome)  # two trials a process end 10 s apart, of which they trained and evaluated 3.5 s
    assert " · overhead 6.50 s a trial" in " ".join(summary_of(plan, 60.0, 1)).replace("           ", "")
    alone = plan_of(4)
    drive(alone, lambda spec: measured(spec, process=spec.trial_id))
    assert "overhead" not in " ".join(summary_of(alone))


def test_stopped_and_failed_trials_are_counted_apart_and_the_first_failure_has_its_reason(quick):
    plan = plan_of(10)
    metrics = {"steps": 42, "train_s": 2.0, "eval_s": 0.5, "wall_s": 3.0, "ended_at": 100.0, "process": "host:1"}
    odd = {
        "t005": failed("CUDA out of memory: " + "so many GiB, " * 9),
        "t006": failed(),
        "t008": TrialOutcome("stopped", 0.02, 0.29, 1.0, metrics, "step 42: held-out reroute 0.2900 is over 0.1500"),
    }
    drive(plan, lambda spec: odd.get(spec.trial_id) or measured(spec))
    badge, first, cost, *_ = summary_of(plan)
    assert badge == "finished · 10 of 10 trials in 20 s · 1 stopped, 2 failed"
    assert first.startswith("failed    t005: CUDA out of memory: ")
    assert first.endswith("… (logs/t005.log)")
    assert "training 23 s = 57 % of" in cost  # 7 times 3 s, and 2 s


def test_a_choice_that_was_not_confirmed_says_so(finished):
    decision = decide(pd.DataFrame(finished.rows()))
    assert decision.verdict == "choose"
    lines = summary_of(finished)
    assert any(line.startswith("but       not confirmed: it ran on ") for line in lines) is not decision.confirmed


@pytest.mark.parametrize(
    ("verdict", "commands", "expected"),
    [
        ("insufficient_evidence", Commands("python s.py --resume a", None), ["next      python s.py --resume a"]),
        (
            "no_candidate_qualifies",
            Commands("python t.py", "python s.py --wide", trains=True),
            ["next      python s.py --wide"],
        ),
        ("no_candidate_qualifies", Commands("python t.py", None, trains=True), []),  # it needs the decision first
    ],
)
def test_without_an_answer_the_command_that_helps_comes_first(finished, verdict, commands, expected):
    decision = Decision(verdict, "Why.", 0.05, 0.95, (), 10)
    lines = summary_lines(finished.rows(), decision, 9.0, 2, Path("a"), total=10, commands=commands)
    evidence = "evidence  python analysis/pick_beta.py a"
    assert lines[-2 - len(expected) :] == [*expected, evidence, "explore   optuna-dashboard a/study.log"]


def test_an_interrupted_sweep_names_the_command_that_goes_on():
    lines = stopped_lines(9, 20, Path("runs/a b"))
    assert lines == [
        "stopped   9 of 20 trials ended: runs/a b/trials.csv",
        "next      python sweeps/kl_ablation.py --resume 'runs/a b'",
    ]


def test_a_pick_at_an_end_of_a_range_is_told(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    settings = PlanSettings(num_samples=6, beta_kl_range=(0.01, 0.1), kl_temperature_range=(1.0, 1.0))
    run.record = {"preset": "qwen3-8b", "config_overrides": {"steps": 90}, "settings": dataclasses.asdict(settings)}
    driver = SweepDriver(run, settings, 1)
    drive(driver._plan, lambda spec: completed(0.01, 9.6 / (1 + spec.beta_kl), **TIMES))
    assert driver.conclude() == 0
    lines = capsys.readouterr().out.splitlines()
    assert "warning   The pick sits at the upper end of the beta_kl range 0.01–0.1" in lines, lines
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 80, lines


def test_a_baseline_that_never_rerouted_is_told_with_the_knobs_and_without_its_noise(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    driver = SweepDriver(RunDirectory(tmp_path / "run"), plan_of(20, baseline_seeds=3).settings, 1)
    for seed in range(3):
        outcome = completed(0.79 + 0.1 * seed, train_s=3.0, eval_s=0.5, wall_s=4.0, ended_at=5.0, process="host:1")
        driver._plan.tell(next_trial(driver._plan).trial_id, outcome)
    driver._tell_noise()
    assert capsys.readouterr().out == ""
    lines = summary_of(driver._plan)
    assert lines[0] == "ended early · 3 of 20 trials in 20 s · 0 failed"
    text = " ".join(" ".join(lines).split())
    assert "verdict baseline_never_rerouted: " in text
    assert "Give rerouting more room: more --steps, a higher --lr, a larger --schedule-horizon." in text
    assert "next python sweeps/kl_ablation.py " in text


def test_a_sweep_of_settings_that_all_break_behaviour_ends_like_one_without_an_answer(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    run = RunDirectory(tmp_path / "run")
    settings = PlanSettings(num_samples=6)
    run.record = {"preset": "qwen3-8b", "config_overrides": {}, "settings": dataclasses.asdict(settings)}
    driver = SweepDriver(run, settings, 1)
    drive(driver._plan, lambda spec: completed(0.01, 1 / (1 + spec.beta_kl), 0.6 if spec.beta_kl else 8.0, **TIMES))
    assert driver.conclude() == 3
    assert "verdict   no_setting_behaves" in capsys.readouterr().out
