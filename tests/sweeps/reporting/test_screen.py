"""Where a sweep writes: a terminal that is one, lines elsewhere, nothing but the end when asked; it never fails it."""

import io
import logging
import os
import pickle
import re
import time
from pathlib import Path

import pytest
from rich.console import Console
from simulated import completed, next_trial, plan_of, tell_baselines

from analysis.decide import decide
from sweeps.reporting import live, screen
from sweeps.reporting.live import Trials
from sweeps.reporting.screen import Repeated, Screen


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def trials(tmp_path):
    """Of a plan with a baseline, two trials that have ended and one that runs."""
    plan = plan_of(20, baseline_seeds=3)
    known = Trials(plan, 50, tmp_path, lambda rows: decide(plan.table()))
    tell_baselines(plan, 0.011, 0.012, 0.010)
    for loss in (0.02, 0.2):
        plan.tell(next_trial(plan).trial_id, completed(loss, 0.5, steps=50))
    next_trial(plan)
    known.update(plan.rows())
    return known


def drawn(trials: Trials, columns: int, rows: int, **options: object) -> list[str]:
    console = Console(file=io.StringIO(), width=columns, height=rows, **options)
    console.print(trials.draw(columns, rows))
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("columns", "rows"), [(120, 40), (80, 24), (60, 12), (40, 6)])
def test_the_table_fits_the_terminal_and_eighty_columns(trials, columns, rows):
    lines = drawn(trials, columns, rows)
    assert max(map(len, lines)) <= min(80, columns), lines
    assert len(lines) < rows, lines
    assert "running" in lines[0]
    assert "best so far" in lines[-1]
    assert lines[2].split()[0].startswith("abl"), "the one that runs"


def test_the_table_has_its_columns_and_judges_in_words_and_colours(trials):
    lines = drawn(trials, 80, 24)
    assert lines[1].split() == ["phase", "beta_kl", "T", "seed", "step", "reroute", "drift", "regression"]
    assert any(line.rstrip().endswith("+0.009 ok") for line in lines), lines
    assert any("+0.189 over 0.049" in line for line in lines), lines
    coloured = "\n".join(drawn(trials, 80, 24, force_terminal=True, color_system="standard"))
    assert re.search(r"\x1b\[32m\+0.009 ok", coloured), coloured
    assert re.search(r"\x1b\[31m\+0.189 over", coloured), coloured
    plain = "\n".join(drawn(trials, 80, 24, force_terminal=True, color_system="standard", no_color=True))
    assert not re.search(r"\x1b\[[\d;]*3[0-7]", plain), plain


@pytest.mark.parametrize(("term", "expected"), [("xterm-256color", True), ("dumb", False), ("unknown", False)])
def test_a_terminal_is_one_that_can_move_its_lines(monkeypatch, term, expected):
    monkeypatch.setenv("TERM", term)
    monkeypatch.setattr("sys.stdout", Terminal())
    asked = Screen()
    assert asked.terminal is expected
    asked.quiet = True
    assert not asked.terminal
    monkeypatch.setattr("sys.stdout", io.StringIO())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert not Screen().terminal


def test_where_no_line_moves_a_phase_is_a_line_and_one_more_each_minute(monkeypatch, capsys):
    monkeypatch.setattr(screen, "HEARTBEAT_S", 0.05)
    asked = Screen()
    with asked.phase("teacher", "runs", 4) as advance:
        advance(1)
        time.sleep(0.3)
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert (first, second) == ("teacher   runs", "teacher   0:00 so far, 25% done, about 0:00 to go")
    asked.quiet = True
    with asked.phase("teacher", "runs") as advance:
        advance(1)
    asked.say("not wanted")
    asked.conclude("the end")
    assert capsys.readouterr().out == "the end\n"


def test_a_phase_on_a_terminal_is_taken_away_and_lines_stay(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    monkeypatch.setattr("sys.stdout", stream)
    asked = Screen()
    asked.begin("starting", "Ray")
    asked.say("a line")
    asked.end()
    written = stream.getvalue()
    assert "starting  Ray" in written
    assert "a line" in written
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h") == 1, "the cursor is hidden and comes back"
    assert written.rindex("\x1b[2K") > written.rindex("starting  Ray"), "the phase is erased"


def test_the_first_words_are_left_out_for_help_and_quiet_runs(capsys):
    for words in (["--help"], ["--num-samples", "20", "--quiet"]):
        Screen().start(words)
    assert capsys.readouterr().out == ""
    asked = Screen()
    asked.start(["--num-samples", "20"])
    asked.begin("loading", "libraries")
    asked.end()
    assert capsys.readouterr().out == "loading   libraries\n"


def test_lines_go_where_they_went_while_the_process_writes_elsewhere(tmp_path, capfd):
    asked, elsewhere = Screen(), tmp_path / "log"
    with asked.kept_apart(), elsewhere.open("w") as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        os.write(1, b"chatter\n")
        asked.say("ours")
        os.dup2(kept, 1)
        os.close(kept)
    asked.say("after")
    assert capfd.readouterr().out == "ours\nafter\n"
    assert elsewhere.read_text() == "chatter\n"


def test_what_fails_on_the_screen_is_logged_once_and_stops_nothing(caplog):
    calls = []

    def fail() -> None:
        calls.append(1)
        raise ValueError("no such colour")

    with caplog.at_level(logging.ERROR):
        repeated = Repeated(fail, 0.01)
        time.sleep(0.3)
        repeated.stop()
    assert len(calls) > 1
    assert [record.message for record in caplog.records] == ["the screen could not be kept up to date"]


def test_a_line_a_minute_says_how_far_the_sweep_is_beside_its_events(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(live, "HEARTBEAT_S", 0.05)
    plan = plan_of(20)
    trials = Trials(plan, 50, tmp_path, lambda rows: decide(plan.table()))
    pickle.dumps(trials)
    next_trial(plan)
    trials.update(plan.rows())
    with trials.shown():
        time.sleep(0.3)
    header, event, heartbeat, *_ = capsys.readouterr().out.splitlines()
    assert (header.split()[:3], event.split()[1:3]) == (["time", "phase", "beta_kl"], ["t000", "baseline"])
    assert heartbeat == " 0:00 0 done, 1 running, 0 failed, 19 left of 20"
