"""How far a sweep is: rows of the table, counts, what is left, and the line a minute, apart from their drawing."""

import dataclasses

import pandas as pd
import pytest
from simulated import completed, drive, failed, next_trial, plan_of, tell_baselines, world

from analysis.decide import decide
from sweeps.reporting.following import Latest
from sweeps.reporting.progress import Pace, Progress, best_so_far, heartbeat, progress, trial_lines
from sweeps.reporting.screen import beat, clock


def test_running_trials_come_first_then_the_last_that_ended(quick):
    plan = plan_of(10)
    tell_baselines(plan, 0.0113, 0.0091, 0.01)
    over, within, running = next_trial(plan), next_trial(plan), next_trial(plan)
    plan.tell(over.trial_id, completed(0.0951, 0.162, steps=70))
    plan.tell(within.trial_id, completed(0.0371, 0.703, steps=70))
    latest = {running.trial_id: Latest(41, 0.0604, 1.103)}
    lines = trial_lines(plan.rows(), latest, 70, plan.tolerance, room=4)
    assert [(line.phase, line.state) for line in lines] == [
        ("ablation", "running"),
        ("ablation", "ok"),
        ("ablation", "over"),
        ("baseline", "baseline"),
    ]
    assert dataclasses.astuple(lines[0]) == ("ablation", "0.5", "1.0", "0", "41/70", "0.0604", "1.1", "…", "running")
    assert dataclasses.astuple(lines[1]) == (
        "ablation",
        "0.3",
        "1.0",
        "0",
        "70/70",
        "0.0371",
        "0.703",
        "+0.026 ok",
        "ok",
    )
    assert lines[2].regression == "+0.084 over 0.049"
    assert (lines[3].beta_kl, lines[3].temperature, lines[3].regression) == ("0", "–", "–")
    assert [line.state for line in trial_lines(plan.rows(), latest, 70, plan.tolerance, room=1)] == ["running"]


def test_a_trial_says_in_a_word_that_it_starts_failed_or_cannot_be_judged_yet():
    plan = plan_of(10)
    begun, broken, early = (next_trial(plan) for _ in range(3))
    plan.tell(broken.trial_id, failed("CUDA out of memory"))
    plan.tell(early.trial_id, completed(0.01, 9.6))
    rows = [row | {"phase": "search"} if row["trial_id"] == early.trial_id else row for row in plan.rows()]
    lines = trial_lines(rows, {broken.trial_id: Latest(3)}, 50, None, room=9)
    by_state = {line.state: line for line in lines}
    assert (begun.trial_id, by_state["running"].step) == ("t000", "starting")
    assert (by_state["failed"].step, by_state["failed"].regression) == ("3/50", "failed: CUDA out of memory")
    assert by_state["baseline"].regression == "not known yet"


def test_trials_and_steps_are_counted():
    plan = plan_of(10)
    done, broken, _, second = (next_trial(plan) for _ in range(4))
    plan.tell(done.trial_id, completed(0.01, 9.6, steps=50))
    plan.tell(broken.trial_id, failed())
    latest = {second.trial_id: Latest(20), broken.trial_id: Latest(10)}
    found = progress(plan.rows(), latest, 10, 50, 130.0, 100.0, Pace())
    assert (found.done, found.failed, found.running, found.left) == (1, 1, 2, 6)
    assert (found.steps_run, found.steps_left) == (50 + 10 + 20, 50 + 30 + 6 * 50)
    assert (found.elapsed_s, found.left_s) == (30.0, None)


def test_what_is_left_is_told_by_steps_since_the_first_was_made_in_this_session():
    pace = Pace()
    assert pace.seconds(0.0, 500, 1000) is None, "another session made them"
    assert pace.seconds(40.0, 500, 1000) is None, "processes that start are no pace"
    assert pace.seconds(50.0, 520, 980) == pytest.approx(980 * 10 / 20)
    assert pace.seconds(60.0, 600, 900) == pytest.approx(900 * 20 / 100)
    assert pace.seconds(60.0, 400, 900) is None, "a trial that begins anew takes its steps back"


def test_the_texts_fit_beside_the_bar_and_on_a_line():
    small = Progress(20, 9, 0, 2, 630, 770, 27.0, 31.2)
    assert small.text() == "9/20 done · 2 running · 0 failed · 9 left · 0:27 elapsed · ~0:31 to go"
    assert heartbeat(small) == " 0:27 9 done, 2 running, 0 failed, 9 left of 20 · about 0:31 to go"
    large = Progress(1000, 788, 100, 100, 0, 0, 360_000.0, 360_000.0)
    assert heartbeat(large).startswith("100:00:00 788 done, 100 running, 100 failed, 12 left of 1000")
    assert len(heartbeat(large)) <= 80
    assert heartbeat(dataclasses.replace(small, left_s=None)).endswith("9 left of 20")


def test_times_and_what_a_phase_says_once_a_minute():
    assert [clock(seconds) for seconds in (0.2, 59.6, 3725)] == ["0:00", "1:00", "1:02:05"]
    assert beat("starting  ", 60.0, 0.0, None) == "starting  1:00 so far"
    assert beat("teacher   ", 60.0, 25.0, 100.0) == "teacher   1:00 so far, 25% done, about 3:00 to go"


def test_the_best_so_far_is_what_would_be_chosen_or_comes_nearest():
    assert best_so_far(None) == "none yet: the baseline comes first"
    plan = plan_of(20)
    tell_baselines(plan, 0.011, 0.012, 0.010)
    assert best_so_far(decide(plan.table())) == "none yet: the baseline comes first"
    drive(plan, world)
    chosen = decide(pd.DataFrame(plan.rows()))
    said = best_so_far(chosen)
    assert said.startswith(f"{chosen.beta_kl:.3g} at T ")
    assert "of baseline, P(ok) " in said
    assert len(said) < 66
    poor = plan_of(10)
    tell_baselines(poor, 0.011, 0.012, 0.010)
    drive(poor, lambda _spec: completed(0.5, 1.0))
    assert "comes nearest, P(ok) < 0.01, asked 0.95" in best_so_far(decide(poor.table()))
