"""What a sweep prints."""

from pathlib import Path

import pandas as pd
import pytest
from simulated import completed, drive, failed, next_trial, plan_of, world

from analysis.decide import decide
from sweeps.progress import EventLines, plan_lines, summary_lines


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
    assert lines[-3] == "subject   rerouting lost ≤ 2.5 % of what the baseline achieves"
    assert lines[-2:] == ["cache     12 kB of 3 GB free", "run       runs/a"]
    assert max(map(len, lines)) <= 80, lines


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
