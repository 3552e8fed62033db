"""A sweep on W&B, offline: what its files hold. No network, no login."""

import contextlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
from offline_wandb import offline_parts, offline_runs
from simulated import drive, failed, file_storage, plan_of, world

from sweeps.reporting import follower, wandb
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
    with followed(run.path, Path("shown"), "project", "offline"):
        pass
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
    assert (baseline.job_type, baseline.tags) == ("trial", ("baseline", "tiny", "completed", "within limit"))
    assert baseline.summary["eval_benign_kl"] > 0
    assert (baseline.exit_code, lost.exit_code) == (0, 1)
    assert (lost.summary["status"], lost.summary["error"]) == ("failed", "out of memory")
    verdict = json.loads((run.path / "report/decision.json").read_text())["verdict"]
    assert (decision.summary["verdict"], decision.job_type, decision.tags) == (verdict, "decision", (verdict, "tiny"))
    figures = {name.removesuffix("._type") for name in decision.summary if name.endswith("._type")}
    assert figures == {path.stem for path in (run.path / "report" / "figures").iterdir()} | {"link list"}
    links = decision.summary["links"]
    assert Path(links["report"]) == run.path / "report" / "report.html"
    assert set(links) == {"report", "decision", "run_dir", "t000", "t001", "t002"}
    for where in links.values():
        assert Path(where).exists(), where

    with followed(run.path, Path("shown"), "project", "offline"):  # as a sweep that is resumed does
        pass
    assert len(list(run.path.glob("wandb/offline-run-*"))) == 4, "a run was logged twice"


def test_a_trial_is_logged_while_it_trains_and_goes_on_as_the_same_run_when_its_sweep_was_killed(run):
    rows = pd.read_csv(run.path / "trials.csv", keep_default_na=False).to_dict("records")
    lines = [json.dumps(dict.fromkeys((*STEPS, *REST), step)) + "\n" for step in range(1, 401)]
    metrics = run.trial("t000") / "metrics.jsonl"
    metrics.write_text("".join(lines[:300]) + lines[300][:9])  # half of a line
    run.write_trials([rows[0] | {"status": "running"}])
    run.update(status="running")

    def logged_and_killed():
        waited_for(lambda: any(part.history for part in offline_parts(run.path)))  # W&B writes by blocks of 32 kB
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), followed(run.path, Path("shown"), "project", "offline"):
        logged_and_killed()
    (killed,) = offline_parts(run.path)
    assert [line["_step"] for line in killed.history] == [*range(1, 301)]
    assert killed.exit_code == follower.INTERRUPTED

    metrics.write_text("".join(lines[:200]))  # what its checkpoint had
    time.sleep(1)  # directories are named by the second
    with followed(run.path, Path("shown"), "project", "offline"):
        waited_for(lambda: len(offline_parts(run.path)) == 2)
        metrics.write_text("".join(lines))
        run.write_trials(rows[:1])
    _, whole = offline_parts(run.path)
    assert [line["_step"] for line in whole.history] == [*range(1, 401)]
    assert (whole.id, whole.name, whole.exit_code) == (killed.id, killed.name, 0)


def waited_for(there: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_runs_have_ids_of_their_own_whatever_the_environment_says(run, tmp_path, monkeypatch):
    for name in ("RUN_ID", "NAME", "RUN_GROUP", "JOB_TYPE", "SWEEP_ID", "RESUME_FROM", "FORK_FROM"):
        monkeypatch.setenv(f"WANDB_{name}", "the-same?_step=1")
    for name, value in {"RESUME": "must", "MODE": "disabled", "DISABLED": "true", "TAGS": "mine,too"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_ENTITY", "team")
    other = RunDirectory(tmp_path / "other" / "sweep-7")
    shutil.copytree(run.path, other.path)
    for directory in (run.path, other.path):
        with followed(directory, Path("shown"), "project", "offline"):
            pass
    parts = [*offline_parts(run.path), *offline_parts(other.path)]
    assert len({part.id for part in parts}) == len(parts) == 8, [part.id for part in parts]
    assert {part.group for part in parts} == {"sweep-7"}
    assert {part.entity for part in parts} == {"team"}
    assert {part.job_type for part in parts} == {"trial", "decision"}
    assert len({part.name for part in parts}) == 4
    assert {part.tags[:2] for part in parts} == {("mine", "too")}


def test_a_sweep_ends_well_where_wandb_cannot(run, capfd):
    (run.path / "wandb").touch()  # in the place of its directory
    with followed(run.path, Path("shown"), "project", "offline"):
        pass
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
    assert not children_of_this_process("sweeps.reporting.follower")


def test_without_a_project_nothing_is_started(tmp_path):
    with followed(tmp_path, tmp_path, None, "online"):
        assert not children_of_this_process("sweeps.reporting.follower")
    assert list(tmp_path.iterdir()) == []


def children_of_this_process(name: str) -> list[psutil.Process]:
    children = psutil.Process().children(recursive=True)
    return [child for child in children if child.status() != psutil.STATUS_ZOMBIE and name in child.cmdline()]
