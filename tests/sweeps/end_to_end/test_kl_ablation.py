"""The command, whole: real Ray, Train, Tune, DeepSpeed and Optuna, on models of a few thousand parameters."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import optuna
import pandas as pd
import pytest
from commands import Sweep, install, world
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft import PeftModel
from planted import Planted, open_to_others, watched_arguments
from transformers import AutoModelForCausalLM

from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide
from analysis.report.wording import headline
from cbtrain.config import cli
from cbtrain.model import tiny
from sweeps import kl_ablation
from sweeps.execution.driver import EXIT_STATUS
from sweeps.plan.budget import PlanSettings, SamplerName

COLUMNS = {
    *("trial_id", "phase", "status", "beta_kl", "kl_temperature", "seed", "steps", "loss_reroute", "loss_retain"),
    *("loss_kl", "eval_loss_reroute", "eval_loss_retain", "eval_benign_kl", "eval_benign_nll", "eval_harmful_nll"),
    *("reroute_regression", "feasible", "train_s", "wall_s", "error"),
}


def test_a_sweep_from_command_to_report_by_packages_that_were_installed_elsewhere(tmp_path, monkeypatch, capsys):
    tiny.build()  # which says so on stderr where it is the first time
    installed = install(tmp_path)
    planted = Planted(tmp_path / "home")
    before = os.umask(0o077)
    sweep = Sweep(
        tmp_path,
        *("--num-samples", "15", "--baseline-seeds", "3", "--run-dir", "elsewhere/a"),
        *("--steps", "20", "--warmup-steps", "5", "--eval-every", "10", "--behaviour-prompts", "4"),
        *("--retain-scale", "0.3", "--lora-init-std", "0.05", "--lr", "0.01"),
        installed=installed,
        environment=planted.environment,
    )
    os.umask(before)
    with watched_arguments(sweep) as arguments:
        status, output, errors = sweep.wait()
    assert errors == ""
    assert status in (0, 3), output
    assert "plan      15 trials = 3 baseline + 4 ablation + 7 search + 1 confirm" in output
    assert max(map(len, output.splitlines())) <= 80, output
    assert sweep.left_behind() == []

    run_dir = tmp_path / "elsewhere" / "a"
    check_cache(run_dir, output)
    check_behaviour(run_dir, output)
    assert (tmp_path / "runs" / "latest").resolve() == run_dir
    trials = pd.read_csv(run_dir / "trials.csv")
    assert set(trials.columns) >= COLUMNS
    assert list(trials.status) == ["completed"] * 15, trials.error
    assert list(trials.phase) == ["baseline"] * 3 + ["ablation"] * 4 + ["search"] * 7 + ["confirm"]
    assert trials.trial_id.is_unique
    assert trials.process.nunique() <= 2, "no process was kept for a second trial"
    check_constraint(trials, json.loads((run_dir / "sweep.json").read_text()))
    check_journal(run_dir, trials)
    check_trial_directories(run_dir, trials)

    done = subprocess.run(
        [sys.executable, "-m", "analysis.pick_beta"],
        cwd=tmp_path,
        env={**os.environ, **planted.environment, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
        umask=0o077,
    )
    decision = json.loads((run_dir / "report" / "decision.json").read_text())
    expected = decide(trials, behaviour=load_behaviour(run_dir, trials))
    assert (decision["verdict"], decision["beta_kl"]) == (expected.verdict, expected.beta_kl)
    assert status == EXIT_STATUS.get(expected.verdict, 0), output
    assert done.returncode == (0 if expected.verdict == "choose" else 3), done.stderr
    assert headline(expected) in " ".join(done.stdout.split())
    assert html.escape(headline(expected)) in (run_dir / "report" / "report.html").read_text()

    # No token is where it can be read: in no file, not on the screen, not among the arguments of a process.
    assert any("raylet" in words for words in arguments), "no argument was seen"
    assert [words for words in arguments if planted.among(words)] == []
    assert planted.among(output + done.stdout + done.stderr) == []
    assert planted.below([run_dir]) == []
    assert open_to_others(run_dir) == []

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", "--num-samples", "15", "--run-dir", "elsewhere/a"])
    capsys.readouterr()
    assert cli.run(kl_ablation.main) == 2
    mend = "--resume elsewhere/a to continue it, or another --run-dir"
    said = f"error: elsewhere/a already holds a sweep (15 of 15 trials ended): {mend}\n"
    assert capsys.readouterr().err == said
    assert not list(run_dir.glob("trials/*/checkpoint")), "a trial that has ended needs none"


def check_constraint(trials: pd.DataFrame, record: dict) -> None:
    """sweep.json and trials.csv agree with the constraint written out, each trial against its own seed."""
    assert record["status"] == "finished"
    baseline = trials[trials.phase == "baseline"].set_index("seed").eval_loss_reroute
    assert record["tolerance"] == pytest.approx(0.05 * (1 - baseline.mean()))
    others = trials[trials.phase != "baseline"]
    expected = others.eval_loss_reroute - others.seed.map(baseline) - record["tolerance"]
    assert others.reroute_regression.tolist() == pytest.approx(expected.tolist())
    assert others.feasible.tolist() == [value <= 0 for value in expected]


def check_cache(run_dir: Path, output: str) -> None:
    """The teacher ran on each row once, before the first trial, and the sweep claims no seconds that it saved."""
    record = json.loads((run_dir / "sweep.json").read_text())["teacher_cache"]
    assert record["rows_computed"] == 43 + 53 + 92 + 100
    # 20 steps of 16 rows a side, with two evaluations on 153 rows.
    assert record["rows_read_by_a_trial"] == 20 * 32 + 2 * 153
    assert " saved" not in output
    assert list((run_dir / "teacher_cache").glob("*/*.safetensors"))
    assert "every step runs the teacher" not in (run_dir / "logs" / "t000.log").read_text()


def check_behaviour(run_dir: Path, output: str) -> None:
    """What the baseline and the chosen setting write is on disk, and the summary tells of it."""
    trials = pd.read_csv(run_dir / "trials.csv")
    decision = decide(trials, behaviour=load_behaviour(run_dir, trials))
    chosen = trials[(trials.beta_kl == decision.beta_kl) & (trials.kl_temperature == decision.kl_temperature)]
    wanted = set(chosen.trial_id) if decision.verdict == "choose" else {"t000"}
    measured = [path.parent.name for path in sorted(run_dir.glob("trials/*/behaviour.json"))]
    assert wanted <= set(measured)
    assert (trials.set_index("trial_id").loc[measured].beta_kl == 0).any(), "no baseline to compare with"
    for trial_id in measured:
        record = json.loads((run_dir / "trials" / trial_id / "behaviour.json").read_text())
        row = trials.set_index("trial_id").loc[trial_id]
        assert record["held_out"]["eval_harmful_nll"] == pytest.approx(row.eval_harmful_nll, rel=1e-4)
        assert record["harmful"]["prompts"] == record["benign"]["prompts"] == 4
    said = " ".join(output.split())
    assert " models answer at most 4 prompts a kind, in at most " in said
    assert "behaviour harmful: " in said
    assert "behaviour benign: " in said


def check_journal(run_dir: Path, trials: pd.DataFrame) -> None:
    """The journal opens with plain Optuna and holds every searched trial, each with its constraint."""
    storage = JournalStorage(JournalFileBackend(str(run_dir / "study.log")))
    study = optuna.load_study(study_name="kl_ablation", storage=storage)
    found = {trial.user_attrs["trial_id"]: trial for trial in study.trials}
    others = trials[trials.phase != "baseline"]
    assert set(found) == set(others.trial_id)
    for row in others.itertuples():
        assert found[row.trial_id].params["beta_kl"] == row.beta_kl
        assert found[row.trial_id].constraints["reroute_regression"] == pytest.approx(row.reroute_regression)


def check_trial_directories(run_dir: Path, trials: pd.DataFrame) -> None:
    """Every trial left its settings, every step, and an adapter that plain PEFT loads."""
    base = None
    for trial in trials.itertuples():
        directory = run_dir / "trials" / trial.trial_id
        steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 21))
        config = json.loads((directory / "config.json").read_text())
        assert (config["beta_kl"], config["seed"]) == (trial.beta_kl, trial.seed)
        assert "Step 20: loss=" in (run_dir / "logs" / f"{trial.trial_id}.log").read_text()
        if base is None:
            base = AutoModelForCausalLM.from_pretrained(config["model"])
    loaded = PeftModel.from_pretrained(base, run_dir / "trials" / "t000" / "adapter")
    assert any(parameter.abs().sum() > 0 for name, parameter in loaded.named_parameters() if "lora_B" in name)


def test_a_dry_run_says_what_it_would_take_and_starts_nothing(small_world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry-run", "--run-dir", "run", "--sampler", "tpe", "--early-stop"]
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *world(small_world, tmp_path), *arguments])
    assert cli.run(kl_ablation.main) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80, lines
    assert any(line.startswith("plan      20 trials") for line in lines)
    assert "search    beta_kl 0.001–2 (log) × kl_temperature 1–4 · TPE" in lines
    assert any(line.startswith("stop      search trials early") for line in lines)
    assert any(re.match(r"cache     teacher states of 64 rows, [\d.]+ kB of .* free", line) for line in lines), lines
    assert any(re.match(r"memory    [\d.]+ MB a worker at its peak, predicted", line) for line in lines), lines
    assert list(tmp_path.iterdir()) == []


def test_the_command_knows_the_samplers_of_the_plan_and_stops_nothing_by_default():
    assert get_type_hints(kl_ablation.SweepSettings)["sampler"] == SamplerName
    settings = kl_ablation.SweepSettings()
    assert (settings.sampler, settings.early_stop) == (PlanSettings().sampler, False)
