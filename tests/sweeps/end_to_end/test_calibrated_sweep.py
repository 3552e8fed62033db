"""A sweep that looks for its recipe first: what it keeps of it, and that it refuses to begin without one."""

import json
import shutil
import sys
import time

import pytest
import ray
from commands import TINY, Sweep

from analysis.pick_beta import write_report
from cbtrain.config import InputError, cli
from cbtrain.model import tiny
from sweeps import kl_ablation

FAST = ("--steps", "42", "--eval-every", "0", "--behaviour-prompts", "0", "--batch-size", "8", "--run-dir", "run")


def test_a_sweep_trains_by_what_its_calibration_found_and_resumes_with_it(tmp_path, monkeypatch, capsys):
    tiny.build()
    sweep = Sweep(tmp_path, "--num-samples", "20", "--calibrate", "--lr", "8e-3", *FAST)
    run, deadline = tmp_path / "run", time.monotonic() + 200
    while not (run / "trials" / "t000" / "config.json").is_file():
        assert sweep.process.poll() is None, sweep.wait()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    sweep.kill()
    calibration = json.loads((run / "calibration.json").read_text())
    record = json.loads((run / "sweep.json").read_text())
    assert calibration["converged"], calibration["reason"]
    assert len(calibration["runs"]) >= 3
    assert sum(each["steps"] for each in calibration["runs"]) <= 20 * 42 / 5 + 4
    trained = json.loads((run / "trials" / "t000" / "config.json").read_text())
    for name, value in calibration["settings"].items():
        assert record["config"][name] == record["config_overrides"][name] == trained[name] == value, name
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", "--resume", "run", "--dry-run"])
    assert cli.run(kl_ablation.main) == 0
    assert "calibrate" not in capsys.readouterr().out


def test_rows_alike_on_both_sides_end_before_the_first_trial_and_again_when_resumed(tmp_path, monkeypatch, capsys):
    world = tiny.build()
    shutil.copy(world / "harmful.jsonl", tmp_path / "harmful.jsonl")
    shutil.copy(world / "harmful.jsonl", tmp_path / "benign.jsonl")
    sides = ("--harmful", "harmful.jsonl", "--benign", "benign.jsonl")
    flags = ("--model", str(world), *TINY, "--lr", "4e-3", "--num-samples", "6", "--calibrate", *sides, *FAST)
    status, output, errors = Sweep(tmp_path, *flags).wait()
    assert (status, errors) == (3, ""), output
    assert "No trial was run: No recipe converged in" in output
    assert not (tmp_path / "run" / "trials.csv").exists()
    with pytest.raises(InputError, match="its calibration ended the sweep before a trial: No recipe converged in"):
        write_report(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", "--resume", "run"])
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray is started for nothing"))
    assert cli.run(kl_ablation.main) == 3
    assert "No trial was run: No recipe converged in" in capsys.readouterr().out
