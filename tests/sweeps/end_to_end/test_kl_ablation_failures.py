"""The command where something goes wrong: trials that fail, a full disk, killed processes, interrupts."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from commands import QUICK, Sweep, world

from sweeps.runtime.failures import LOST


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


def test_a_trial_killed_twice_fails_alone_and_the_interrupted_sweep_leaves_a_checkpoint_of_the_next(
    small_world, tmp_path
):
    sweep = endless(small_world, tmp_path, "--checkpoint-every", "20")
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
    sent = time.time()
    trials = check_interrupted(sweep, tmp_path, signal.SIGUSR1, 143)
    assert trials.status.tolist() == ["failed", "running"]
    assert trials.error[0] == LOST
    assert trials.failures[0] == 1
    trial = tmp_path / "run" / "trials" / "t001"
    manifest = trial / "checkpoint" / "manifest.json"
    done = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert 0 < done[-1] <= json.loads(manifest.read_text())["step"] <= done[-1] + 10, "the last logged step, or later"
    assert manifest.stat().st_mtime - sent < 15


def trained_by(tmp_path: Path, trial_id: str) -> int | None:
    """The process that trains a trial, or trained it last."""
    said = (tmp_path / "run" / "trials" / trial_id / "lock").read_text()
    return int(said.rpartition(":")[2]) if said else None


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


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
