"""The command where something goes wrong: trials that fail, a full disk, killed processes, interrupts, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import QUICK, Sweep, world

from cbtrain.config import cli
from sweeps import kl_ablation
from sweeps.execution.processes import LOST


@pytest.fixture
def full_disk(tmp_path):
    """A file system with room for bytes and none for files, as under a quota."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=10m,nr_inodes=3", "tmpfs", place]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a file system can be mounted by root alone")
    yield place
    subprocess.run(["umount", place], check=True)


def test_failed_trials_and_a_full_disk_leave_their_reasons_and_nothing_running(small_world, tmp_path, full_disk):
    arguments = ["--num-samples", "3", "--baseline-seeds", "2", "--steps", "4", "--lr", "1e30", *QUICK]
    arguments += ["--teacher-cache", str(full_disk), "--max-concurrent", "1"]
    sweep = Sweep(tmp_path, *world(small_world, tmp_path), *arguments, "--run-dir", "run")
    status, output, errors = sweep.wait()
    assert status == 3, errors
    assert "Traceback" not in output + errors
    assert sweep.left_behind() == []
    said = " ".join(output.split())
    assert "cache off, every step runs the teacher: " in said
    assert "No space left on device" in said
    assert "No space left" in json.loads((tmp_path / "run" / "sweep.json").read_text())["teacher_cache"]
    assert not list(full_disk.rglob("*.safetensors"))
    assert "baseline_failed" in output
    assert "NonFiniteLossError" in output
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert trials[trials.phase == "baseline"].status.tolist() == ["failed"] * 2
    assert "NonFiniteLossError" in (tmp_path / "run" / "logs" / "t000.log").read_text()


def test_a_trial_whose_process_is_killed_goes_on_in_another_and_at_the_second_time_fails_alone(small_world, tmp_path):
    sweep = endless(small_world, tmp_path, "--checkpoint-every", "2")
    wait_for_a_step(tmp_path, "t000")
    first = trained_by(tmp_path, "t000")
    wait_until((tmp_path / "run" / "trials" / "t000" / "checkpoint" / "manifest.json").is_file)
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: trained_by(tmp_path, "t000") not in (None, first))
    log = tmp_path / "run" / "logs" / "t000.log"
    said = log.stat().st_size
    wait_until(lambda: "Step" in log.read_text()[said:])
    os.kill(trained_by(tmp_path, "t000"), signal.SIGKILL)
    wait_for_a_step(tmp_path, "t001")
    trials = check_interrupted(sweep, tmp_path, signal.SIGTERM, 143)
    assert trials.status.tolist() == ["failed", "running"]
    assert trials.error[0] == LOST
    assert trials.failures[0] == 1


def trained_by(tmp_path: Path, trial_id: str) -> int | None:
    """The process that trains a trial, or trained it last."""
    said = (tmp_path / "run" / "trials" / trial_id / "lock").read_text()
    return int(said.rpartition(":")[2]) if said else None


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_interrupted_sweep_leaves_no_process_and_a_readable_directory(small_world, tmp_path):
    sweep = endless(small_world, tmp_path)
    for line in sweep.process.stdout:
        if "started" in line:
            break
    assert set(check_interrupted(sweep, tmp_path, signal.SIGINT, 130).status) == {"running"}


def endless(small_world: Path, tmp_path: Path, *more: str) -> Sweep:
    """A sweep whose trials do not end, one at a time."""
    arguments = ["--num-samples", "4", "--steps", "100000", "--max-concurrent", "1", "--run-dir", "run"]
    return Sweep(tmp_path, *world(small_world, tmp_path), *arguments, *more)


def wait_for_a_step(tmp_path: Path, trial_id: str) -> None:
    """Return when a trial has made its first step."""
    log, deadline = tmp_path / "run" / "logs" / f"{trial_id}.log", time.monotonic() + 120
    while time.monotonic() < deadline:
        if log.exists() and "Step" in log.read_text():
            return
        time.sleep(0.1)
    pytest.fail(f"{trial_id} never began")


def check_interrupted(sweep: Sweep, tmp_path: Path, sent: signal.Signals, expected: int) -> pd.DataFrame:
    """Interrupt the sweep; its trials, when it has ended with that status and left a directory to go on from."""
    sweep.process.send_signal(sent)
    status, _, errors = sweep.wait()
    assert status == expected, errors
    assert "Traceback" not in errors
    assert sweep.left_behind() == []
    assert json.loads((tmp_path / "run" / "sweep.json").read_text())["status"] == "interrupted"
    return pd.read_csv(tmp_path / "run" / "trials.csv")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harmful", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--gpus-per-worker", "-1"], "--gpus-per-worker -1.0: must be 0 or more"),
        (["--gpus-per-worker", "nan"], "--gpus-per-worker nan: must be 0 or more"),
        (["--gpus-per-worker", "1.5"], "--gpus-per-worker 1.5: a share of one GPU, or a whole number"),
        (["--harmful", "{broken}"], "broken.jsonl:2: not JSON"),
        (["--harmful", "{runs}", "--benign", "{runs}"], "harmful"),
        (["--harmful", "{user_only}"], "scored token"),
        (["--preset", "tinny"], "--preset tinny: no such preset; did you mean tiny?"),
        (["--num-sample", "4", "--stepz", "3"], "did you mean --num-samples?"),
        (["--target-layers", "9"], "--target-layers 9: the model has hidden states 0–3"),
        (["--target-layers", "1", "--lora-layers", "2"], "no LoRA layer below it (LoRA covers blocks 2–2)"),
        (["--num-samples", "2"], "--num-samples 2: 3 baseline seeds + 1 trial to compare = 4 at least"),
        (["--run-dir", "{taken}"], "already holds a sweep"),
        (["--beta-kl", "0.5"], "--beta-kl 0.5: the sweep searches it; leave the flag out, or give --beta-kl-range"),
        (["--beta-kl", "0.3"], "--beta-kl 0.3: the sweep searches it; leave the flag out, or give --beta-kl-range"),
        (["--beta-kl-range", "nan", "2"], "--beta-kl-range nan 2: must be two numbers from 1e-09 to 1e+09"),
        (["--beta-kl-range", "-1", "2"], "--beta-kl-range -1 2: must be two numbers"),
        (["--beta-kl-range", "0.3"], "--beta-kl-range: must be two numbers, not 0.3"),
        (["--beta-kl-range"], "--beta-kl-range: must be two numbers, not none"),
        (["--beta-kl-range", "low", "2"], "--beta-kl-range: must be two numbers, not low 2"),
        (["--kl-temperature-range", "1", "2", "3"], "--kl-temperature-range: must be one or two numbers, not 1 2 3"),
        (["--kl-temperature-range", "4", "1"], "--kl-temperature-range 4 1: must be one or two numbers"),
        (["--model", "/nowhere/model"], "--model /nowhere/model: no such directory"),
        (["--workers-per-trial", "3"], "--batch-size 16: not divisible by 3 workers"),
        (["--lora-targets", "c_attn"], "--lora-targets c_attn: not a linear module of the blocks"),
        (["--max-concurrent", "0"], "--max-concurrent 0"),
        (["--harmful"], "--harmful: name at least one"),
        (["--lora-targets"], "--lora-targets: name at least one"),
        (["--run-dir", "{taken}/sweep.json/x"], "is not a directory that can be written to"),
        (["--reroute-tolerance", "1.5"], "--reroute-tolerance 1.5"),
        (["--teacher-cache", "{taken}/sweep.json"], "--teacher-cache"),
        (["--early-stop", "--eval-every", "0"], "--early-stop: with --eval-every 0 a trial of 80 steps has 1 held-out"),
        (["--early-stop", "--baseline-seeds", "2"], "--early-stop: 2 baseline seeds, stopping needs 3"),
    ],
)
def test_bad_input_is_one_line_and_status_2_before_anything_is_written(
    small_world, tmp_path, monkeypatch, capsys, arguments, message
):
    row = (small_world / "harmful.jsonl").read_text().splitlines()[0]
    (tmp_path / "broken.jsonl").write_text(row + "\n{not json\n")
    # Labelled rows of the other side only: no harmful row among them.
    benign_run = {"messages": json.loads(row)["messages"], "metadata": {"injection_task_id": None, "security": True}}
    (tmp_path / "runs.jsonl").write_text(json.dumps(benign_run) + "\n")
    (tmp_path / "user_only.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "how ?"}]}) + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "sweep.json").write_text("{}")
    places = {name: str(tmp_path / f"{name}.jsonl") for name in ("broken", "runs", "user_only")}
    arguments = [argument.format(**places, taken=tmp_path / "taken") for argument in arguments]
    run_dir = [] if "--run-dir" in arguments else ["--run-dir", str(tmp_path / "run")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *world(small_world, tmp_path), *run_dir, *arguments])
    status = cli.run(kl_ablation.main)
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "taken" / "sweep.json").read_text() == "{}"
