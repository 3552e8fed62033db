"""The command resumes a sweep: one that was killed for real, and what it says, concludes and refuses."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from commands import Sweep
from simulated import file_storage, measured, next_trial, plan_of

from cbtrain.config import cli
from cbtrain.model import tiny
from sweeps import kl_ablation
from sweeps.plan.plan import LEADERS


def test_a_sweep_killed_with_all_its_processes_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    for name in ("cbtrain", "sweeps"):  # another checkout where the user stands
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('of the wrong directory')")
    tiny.build()  # which says so on stderr where it is the first time
    sweep = Sweep(
        tmp_path,
        *("--num-samples", "4", "--baseline-seeds", "2", "--run-dir", "run", "--behaviour-prompts", "0"),
        *("--steps", "30", "--warmup-steps", "5", "--eval-every", "0", "--checkpoint-every", "3"),
        *("--retain-scale", "0.3", "--lora-init-std", "0.05", "--lr", "0.01", "--max-concurrent", "1"),
    )
    run = tmp_path / "run"
    wait_for_a_checkpoint_after(run, ended=0)
    status, _, error = command(monkeypatch, capsys, "--resume", str(run))
    assert (status, f"{run}: its sweep is still running (" in error) == (2, True), error
    wait_for_a_checkpoint_after(run, ended=2)
    sweep.kill()
    before = pd.read_csv(run / "trials.csv")
    ended = before[before.status == "completed"]
    printed_before = {log.stem: log.read_text() for log in (run / "logs").glob("t*.log")}
    # The journal is written first, so that a trial may have ended by it and not by the table.
    kept = {trial_id: (run / "logs" / f"{trial_id}.log").read_bytes() for trial_id in ended.trial_id}
    assert len(ended) >= 2, before
    assert set(before.status) == {"completed", "running"}

    resumed = Sweep(tmp_path, "--resume", "runs/latest", "--num-samples", "5")
    status, output, errors = resumed.wait()
    assert (status, errors) == (0, ""), output
    assert resumed.left_behind() == []
    told = re.search(r"^resume    (\d) of 5 trials ended, ", output, flags=re.M)
    assert told, output
    in_journal = int(told[1])
    assert len(ended) <= in_journal <= len(ended) + 1
    assert "on from step " in output
    assert f"finished · 5 of 5 trials ({in_journal} before this session) in " in output
    after = pd.read_csv(run / "trials.csv")
    assert after.trial_id.tolist() == [f"t{number:03d}" for number in range(5)]
    assert after.status.tolist() == ["completed"] * 5, after.error
    assert after.phase.tolist() == ["baseline"] * 2 + ["ablation"] * 3
    pd.testing.assert_frame_equal(
        after.loc[ended.index, ["eval_benign_kl", "ended_at"]], ended[["eval_benign_kl", "ended_at"]]
    )
    assert {trial_id: (run / "logs" / f"{trial_id}.log").read_bytes() for trial_id in kept} == kept
    went_on = after[after.resumed_from > 0]
    assert len(went_on) >= 1, after.resumed_from
    for trial in after.itertuples():
        lines = (run / "trials" / trial.trial_id / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == list(range(1, 31))
        printed = (run / "logs" / f"{trial.trial_id}.log").read_text()
        # A trial killed during its last evaluation has printed its last step, and trains it again.
        last_steps = printed.count("Step 30: loss=")
        assert last_steps == 1 or last_steps == 1 + (
            trial.trial_id not in kept and printed_before[trial.trial_id].count("Step 30: loss=")
        ), trial
        begun = printed.count("Step 1: loss=")
        assert begun == 1 or (begun == 2 and trial.trial_id not in kept and not trial.resumed_from > 0), trial
    record = json.loads((run / "sweep.json").read_text())
    assert (record["status"], [session["trials_ended"] for session in record["resumed"]]) == ("finished", [in_journal])
    assert not list(run.glob("trials/*/checkpoint"))


def wait_for_a_checkpoint_after(run: Path, ended: int) -> None:
    """Return when so many trials have ended and another has written a checkpoint."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        time.sleep(0.02)
        if (run / "trials.csv").exists():
            trials = pd.read_csv(run / "trials.csv")
            running = trials[trials.status == "running"].trial_id
            begun = any((run / "trials" / trial_id / "checkpoint" / "manifest.json").exists() for trial_id in running)
            if begun and (trials.status == "completed").sum() >= ended:
                return
    raise AssertionError("no checkpoint came")


def command(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    """The command in this process: its exit status, output and errors."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *arguments])
    status = cli.run(kl_ablation.main)
    return status, *capsys.readouterr()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, text
    path.write_text(text.replace(old, new, 1))


def test_what_will_be_resumed_is_told_beforehand_and_nothing_is_touched(killed, monkeypatch, capsys):
    edit(killed.path / "sweep.json", '"torch": "', '"torch": "0.')
    with (killed.path / "study.log").open("a") as file:
        file.write('{"op_code": 8, "wor')
    before = {path: path.read_bytes() for path in killed.path.rglob("*") if path.is_file() and path.name != "lock"}
    status, output, error = command(monkeypatch, capsys, "--resume", "runs/latest", "--num-samples=9", "--dry-run")
    assert (status, error) == (0, "")
    lines = output.splitlines()
    assert "plan      9 trials = 3 baseline + 4 ablation + 2 search" in lines
    assert "cache     off, every step runs the teacher" in lines
    told = " ".join(" ".join(lines).split())
    assert "2 of 9 trials ended, 2 were interrupted: they go on from the start and from the start" in told
    assert "warning changed since the sweep began: torch 0." in told
    assert max(map(len, lines)) <= 80, lines
    assert {path: path.read_bytes() for path in before} == before


def test_a_finished_sweep_is_concluded_without_running_anything(killed, monkeypatch, capsys):
    plan = plan_of(6, file_storage(killed.path), baseline_seeds=3)
    while not plan.done:
        spec = next_trial(plan)
        (killed.trial(spec.trial_id) / "checkpoint").mkdir(parents=True)
        plan.tell(spec.trial_id, measured(spec))
    status, output, error = command(monkeypatch, capsys, "--resume", "run", "--behaviour-prompts", "0")
    assert (status, error) == (0, "")
    assert "6 of 6 trials ended: nothing is left to run (--num-samples N adds trials)" in " ".join(output.split())
    assert "  python analysis/pick_beta.py run\n" in output
    assert json.loads((killed.path / "sweep.json").read_text())["status"] == "finished"
    assert pd.read_csv(killed.path / "trials.csv").status.tolist() == ["completed"] * 6
    assert not list(killed.path.glob("trials/*/checkpoint"))


def test_a_damaged_behaviour_of_a_finished_sweep_is_one_line_here_as_for_pick_beta(killed, monkeypatch, capsys):
    plan = plan_of(6, file_storage(killed.path), baseline_seeds=3)
    while not plan.done:
        spec = next_trial(plan)
        plan.tell(spec.trial_id, measured(spec))
    for trial in plan.rows():
        killed.trial(str(trial["trial_id"])).mkdir(parents=True, exist_ok=True)
        (killed.trial(str(trial["trial_id"])) / "behaviour.json").write_text("{}")
    status, _, error = command(monkeypatch, capsys, "--resume", "run", "--behaviour-prompts", "4")
    assert (status, error.count("\n")) == (2, 1), error
    assert re.match(r"error: \S+/t000/behaviour.json: not what `cbtrain.evaluate` writes: remove it", error), error


def test_a_sweep_whose_baseline_never_rerouted_ends_there_and_says_which_knob_to_turn(killed, monkeypatch, capsys):
    killed.journal.unlink()
    plan = plan_of(6, file_storage(killed.path), baseline_seeds=3)
    while not plan.done:
        spec = next_trial(plan)
        plan.tell(spec.trial_id, dataclasses.replace(measured(spec), eval_loss_reroute=0.9))
    status, output, error = command(monkeypatch, capsys, "--resume", "run")
    assert (status, error) == (3, "")
    said = " ".join(output.split())
    assert "verdict baseline_never_rerouted" in said
    assert "more --steps, a higher --lr" in said
    assert pd.read_csv(killed.path / "trials.csv").phase.tolist() == ["baseline"] * LEADERS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere"], "--resume nowhere: holds no sweep (no sweep.json)"),
        (["--resume", "run", "--lr", "1e-3"], "--lr: comes from run/sweep.json when resuming; leave it out"),
        (["--seed=3", "--resume", "run"], "--seed: comes from run/sweep.json"),
        (["--resume", "run", "--config", "tiny"], "--preset: comes from run/sweep.json"),
        (["--resume", "run", "--baseline_seeds", "3"], "--baseline-seeds: comes from run/sweep.json"),
        (["--resume", "run", "--no-early-stop"], "--early-stop: comes from run/sweep.json"),
        (["--resume", "run", "--sampler", "tpe"], "--sampler: comes from run/sweep.json"),
        (["--resume", "run", "--run-dir", "other"], "--run-dir: comes from run/sweep.json"),
        (["--resume", "run", "--num-samples", "5"], "--num-samples 5: the sweep has 6; it can grow, not shrink"),
        (["--resume", "run", "--max-concurrent", "0"], "--max-concurrent 0: must be 1 or more"),
        (["--run-dir", "run"], "run already holds a sweep (2 of 6 trials ended): --resume run to continue it, or"),
    ],
)
def test_what_cannot_be_asked_of_a_resumed_sweep_is_one_line_and_status_2(
    killed, monkeypatch, capsys, arguments, message
):
    assert message in refusal(monkeypatch, capsys, *arguments)


def refusal(monkeypatch, capsys, *arguments: str) -> str:
    """The one line with which the command ends, with status 2."""
    status, _, error = command(monkeypatch, capsys, *(arguments or ("--resume", "run")))
    assert status == 2, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    return error


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"preset"', "preset", "run/sweep.json: not JSON"),
        ('"config":', '"konfig":', "run/sweep.json: no config in it"),
        ('"settings":', '"settings": 3, "x":', "run/sweep.json: no settings in it"),
        ('"confidence":', '"surety":', "run/sweep.json: settings.surety: no such field"),
        ('"lora_rank": 32', '"lora_rank": "8"', "run/sweep.json: config.lora_rank: '8' must be a whole number"),
        ('"lora_rank": 32,', "", "run/sweep.json: config.lora_rank: missing"),
        ('"seed": 0', '"seed": -1', "run/sweep.json: settings: --seed -1: must be 0 or more"),
        ('"max_concurrent": null', '"max_concurrent": "all"', "run/sweep.json: flags.max_concurrent: 'all' must be"),
        ('"baseline": 3', '"baseline": 9', "--num-samples 6: 9 baseline seeds + 1 trial"),
    ],
)
def test_a_sweep_json_that_does_not_hold_a_sweep_is_refused(killed, monkeypatch, capsys, old, new, message):
    edit(killed.path / "sweep.json", old, new)
    assert message in refusal(monkeypatch, capsys)


def test_data_that_are_not_what_they_were_are_refused(killed, monkeypatch, capsys, tmp_path):
    data = tmp_path / "data" / "benign.jsonl"
    text = data.read_text()
    data.write_text(text.replace("user", "User", 1))
    assert f"{data}: changed since the sweep began; put it back as it was" in refusal(monkeypatch, capsys)
    data.unlink()
    assert f"{data}: gone since the sweep began; put it back" in refusal(monkeypatch, capsys)
    data.write_text(text)
    status, _, error = command(monkeypatch, capsys, "--resume", "run", "--dry-run")
    assert (status, error) == (0, "")


def test_a_sweep_of_an_older_version_is_accepted(killed, monkeypatch, capsys):
    """From before checksums, relative norms and ranges of one's own."""
    record = json.loads((killed.path / "sweep.json").read_text())
    del record["inputs"], record["flags"]
    for name in ("retain_norm", "retain_scale", "retain_norms"):
        del record["config"][name]
    for name in ("beta_kl_range", "kl_temperature_range"):
        del record["settings"][name]
    (killed.path / "sweep.json").write_text(json.dumps(record))
    assert command(monkeypatch, capsys, "--resume", "run", "--dry-run")[0] == 0


def test_a_journal_damaged_in_its_middle_is_refused(killed, monkeypatch, capsys):
    journal = killed.path / "study.log"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join([*lines[:2], lines[2][:20] + "\n", *lines[3:]]))
    assert "run/study.log:3: damaged (not JSON)" in refusal(monkeypatch, capsys)
    journal.write_text('{"op_code": 4}\n')
    assert "run/study.log: not this sweep's journal" in refusal(monkeypatch, capsys)


def test_more_trials_do_not_ask_for_more_baselines(killed, monkeypatch, capsys):
    status, output, _ = command(monkeypatch, capsys, "--resume", "run", "--num-samples", "40", "--dry-run")
    assert (status, "40 trials = 3 baseline + 4 ablation + 29 search + 4 confirm" in output) == (0, True), output
