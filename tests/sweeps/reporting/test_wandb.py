"""A sweep on W&B, offline: what its files hold. No network, no login."""

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest
from offline_wandb import offline_runs
from simulated import drive, failed, file_storage, plan_of, world

from sweeps.reporting import wandb
from sweeps.reporting.wandb import followed
from sweeps.storage.run_directory import RunDirectory

STEPS = ("step", "loss", "loss_reroute", "loss_retain", "loss_kl", "cs", "cr", "alpha", "beta_kl", "kl_temperature")
REST = ("kl_weight", "grad_norm_total", "lr", "tokens_per_s")


@pytest.fixture
def run(tmp_path: Path, quick: None) -> RunDirectory:
    """A finished sweep of three trials, the last of which failed with half a line of metrics."""
    run = RunDirectory(tmp_path / "sweep-7")
    (run.path / "logs").mkdir(parents=True)
    plan = plan_of(3, file_storage(run.path), baseline_seeds=1)
    drive(plan, lambda spec: failed() if spec.trial_id == "t002" else world(spec))
    rows = [row | {"loss_reroute": 0.1, "train_s": 1.0} for row in plan.rows()]
    rows = [
        dict.fromkeys(("loss_retain", "eval_loss_retain", "eval_benign_nll", "base_benign_nll", "wall_s")) | row
        for row in rows
    ]
    for row in rows:
        directory = run.trial(str(row["trial_id"]))
        directory.mkdir(parents=True)
        (directory / "config.json").write_text(json.dumps({"lr": 0.001, "seed": row["seed"]}))
        lines = [json.dumps(dict.fromkeys((*STEPS, *REST), step)) for step in (10, 20)]
        half = '{"step": 3' if row["status"] == "failed" else ""
        (directory / "metrics.jsonl").write_text("\n".join([*lines, half]))
    settings = {"num_samples": 3, "reroute_tolerance": 0.05, "confidence": 0.95}
    run.record = {"settings": settings, "preset": "tiny", "config": {"steps": 20}, "config_overrides": {}}
    run.write_trials(rows)
    run.update(status="finished", tolerance=plan.tolerance, wall_s=5.0, versions={}, git_commit=None)
    return run


def test_each_trial_is_a_run_and_the_decision_one_more_in_the_sweeps_group(run, capfd):
    with followed(run.path, Path("shown"), "project", "offline") as tell:
        tell(["t000"])
        tell(["t001", "t002"])
    captured = capfd.readouterr()
    assert captured.out == "wandb     4 runs, offline: wandb sync shown/wandb/offline-run-*\n"
    assert captured.err == ""
    runs = offline_runs(run.path)
    assert set(runs) == {f"sweep-7-{name}" for name in ("t000", "t001", "t002", "decision")}
    assert {(logged.group, logged.project) for logged in runs.values()} == {("sweep-7", "project")}
    baseline, lost, decision = (runs[f"sweep-7-{name}"] for name in ("t000", "t002", "decision"))
    assert [line["_step"] for line in baseline.history] == [10, 20]
    assert set(baseline.history[0]) >= {*STEPS, *REST}
    assert (baseline.config["lr"], baseline.config["phase"], baseline.config["beta_kl"]) == (0.001, "baseline", 0)
    assert baseline.summary["eval_benign_kl"] > 0
    assert (baseline.exit_code, lost.exit_code) == (0, 1)
    assert (lost.summary["status"], lost.summary["error"]) == ("failed", "out of memory")
    assert decision.summary["verdict"] == json.loads((run.path / "report/decision.json").read_text())["verdict"]
    figures = {name.removesuffix("._type") for name in decision.summary if name.endswith("._type")}
    assert figures == {path.stem for path in (run.path / "report" / "figures").iterdir()}

    with followed(run.path, Path("shown"), "project", "offline") as tell:  # as a sweep that is resumed does
        tell(["t000", "t001"])
        run.update(status="interrupted")
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 4, "a trial was logged twice"


def test_a_sweep_ends_well_where_wandb_cannot(run, capfd):
    (run.path / "wandb").touch()  # in the place of its directory
    with followed(run.path, Path("shown"), "project", "offline") as tell:
        tell(["t000"])
    captured = capfd.readouterr()
    assert captured.out == "wandb     0 of 4 runs logged; the rest: see shown/logs/wandb.log\n"
    assert captured.err == ""
    assert "W&B: not tracked (" in (run.path / "logs" / "wandb.log").read_text()


def test_an_interrupted_sweep_is_not_kept_waiting_and_logs_no_decision(run, monkeypatch):
    monkeypatch.setattr(wandb, "WHEN_STOPPED_S", 2.0)
    run.update(status="interrupted")
    started = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), followed(run.path, Path("shown"), "project", "offline"):
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    assert not (run.path / "report").exists()
    assert not children_of_this_process("sweeps.reporting.wandb")


def test_without_a_project_nothing_is_started(tmp_path):
    with followed(tmp_path, tmp_path, None, "online") as tell:
        tell(["t000"])
        assert not children_of_this_process("sweeps.reporting.wandb")
    assert list(tmp_path.iterdir()) == []


def children_of_this_process(name: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and name in child.cmdline()]
