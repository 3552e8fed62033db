"""The command, whole: real Ray, Train, Tune, DeepSpeed and Optuna, on models of a few thousand parameters."""

import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import optuna
import pandas as pd
import psutil
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft import PeftModel
from transformers import AutoModelForCausalLM

from cbtrain import cli
from sweeps import kl_ablation

ROOT = Path(__file__).parents[2]
QUICK = ("--warmup-steps", "2", "--batch-size", "8", "--eval-every", "0")
COLUMNS = {
    *("trial_id", "phase", "status", "beta_kl", "kl_temperature", "seed", "steps", "loss_reroute", "loss_retain"),
    *("loss_kl", "eval_loss_reroute", "eval_loss_retain", "eval_benign_kl", "eval_benign_nll", "eval_harmful_nll"),
    *("reroute_regression", "feasible", "train_s", "wall_s", "error"),
}


class Sweep:
    """The command as a process, and what of it is left when it has ended."""

    def __init__(self, *arguments: str) -> None:
        self.mark = uuid.uuid4().hex
        self._shared_memory = set(os.listdir("/dev/shm"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "SWEEP_TEST_MARK": self.mark}
        environment.pop("RAY_ADDRESS", None)
        self.process = subprocess.Popen(
            [sys.executable, "sweeps/kl_ablation.py", *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> tuple[int, str, str]:
        """Exit status, output and errors; whatever hangs is killed by its own handle."""
        try:
            output, errors = self.process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return self.process.returncode, output, errors

    def left_behind(self) -> list[str]:
        """Processes that inherited this command's environment, and new files in shared memory."""
        gone = []
        for process in psutil.process_iter(["name"]):
            try:
                if process.environ().get("SWEEP_TEST_MARK") == self.mark:
                    gone.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
        _, alive = psutil.wait_procs(gone, timeout=10)
        return [str(process) for process in alive] + sorted(set(os.listdir("/dev/shm")) - self._shared_memory)


def world(directory: Path) -> list[str]:
    """Flags for model and data, relative to where the command starts."""
    directory = Path(os.path.relpath(directory, ROOT))
    return [
        *("--model", str(directory)),
        *("--harmful", str(directory / "harmful.jsonl")),
        *("--benign", str(directory / "benign.jsonl")),
    ]


def test_a_sweep_from_command_to_report(tmp_path):
    run_dir = tmp_path / "runs" / "a"
    sweep = Sweep(
        *("--num-samples", "6", "--baseline-seeds", "2", "--run-dir", str(run_dir)),
        *("--steps", "30", "--warmup-steps", "5", "--eval-every", "15"),
    )
    status, output, errors = sweep.wait()
    assert status == 0, errors
    assert errors == ""
    assert "plan      6 trials = 2 baseline + 4 ablation" in output
    assert all(len(line) <= 80 for line in output.splitlines() if str(tmp_path) not in line), output
    assert sweep.left_behind() == []

    trials = pd.read_csv(run_dir / "trials.csv")
    assert set(trials.columns) >= COLUMNS
    assert list(trials.status) == ["completed"] * 6, trials.error
    assert list(trials.phase) == ["baseline"] * 2 + ["ablation"] * 4
    assert trials.trial_id.is_unique
    later = trials[trials.process.duplicated()]
    assert len(later) == 6 - trials.process.nunique() >= 2, "no process was kept for a second trial"
    record = json.loads((run_dir / "sweep.json").read_text())
    assert record["status"] == "finished"
    baseline = trials[trials.phase == "baseline"]
    assert record["tolerance"] == pytest.approx(0.05 * (1 - baseline.eval_loss_reroute.mean()))
    pairs = trials[trials.phase == "ablation"]
    expected = pairs.eval_loss_reroute - baseline.eval_loss_reroute.iloc[0] - record["tolerance"]
    assert pairs.reroute_regression.tolist() == pytest.approx(expected.tolist())
    assert (run_dir.parent / "latest").resolve() == run_dir

    study = optuna.load_study(
        study_name="kl_ablation", storage=JournalStorage(JournalFileBackend(str(run_dir / "study.log")))
    )
    assert len(study.trials) == 4
    for trial in trials.itertuples():
        directory = run_dir / "trials" / trial.trial_id
        steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(1, 31))
        config = json.loads((directory / "config.json").read_text())
        assert (config["beta_kl"], config["seed"]) == (trial.beta_kl, trial.seed)
    base = AutoModelForCausalLM.from_pretrained(record["config"]["model"])
    assert PeftModel.from_pretrained(base, run_dir / "trials" / "t000" / "adapter").peft_config

    done = subprocess.run(
        [sys.executable, "analysis/pick_beta.py", str(run_dir)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    decision = json.loads((run_dir / "report" / "decision.json").read_text())
    assert done.returncode == (0 if decision["verdict"] == "choose" else 3), done.stderr
    assert (run_dir / "report" / "report.html").stat().st_size > 10_000

    again = Sweep("--num-samples", "6", "--run-dir", str(run_dir))
    status, _, errors = again.wait()
    assert (status, errors.count("\n")) == (2, 1), errors
    assert "already holds a sweep (6 of 6 trials ended)" in errors


def test_workers_of_its_own_run_the_same_loop(small_world, tmp_path):
    arguments = ["--num-samples", "2", "--baseline-seeds", "1", "--steps", "3", *QUICK, *world(small_world)]
    two = Sweep(*arguments, "--workers-per-trial", "2", "--zero-stage", "2", "--run-dir", str(tmp_path / "two"))
    status, output, errors = two.wait()
    assert status in (0, 3), errors
    assert two.left_behind() == []
    one = Sweep(*arguments, "--max-concurrent", "1", "--run-dir", str(tmp_path / "one"))
    assert one.wait()[0] == status
    ours, theirs = (pd.read_csv(tmp_path / name / "trials.csv") for name in ("two", "one"))
    assert list(ours.status) == ["completed"] * len(ours), (ours.error.tolist(), output)
    assert len(ours) == len(theirs)
    for name in ("loss_reroute", "loss_kl", "eval_loss_reroute", "eval_benign_kl"):
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-4), name


def test_a_baseline_that_never_reroutes_ends_the_sweep(small_world, tmp_path):
    arguments = ["--num-samples", "8", "--baseline-seeds", "2", "--steps", "3", "--lr", "1e-6", *QUICK]
    sweep = Sweep(*arguments, *world(small_world), "--run-dir", str(tmp_path / "run"))
    status, output, errors = sweep.wait()
    assert status == 3, errors
    assert "baseline_never_rerouted" in output
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert 2 <= len(trials) < 8
    assert set(trials.phase) <= {"baseline", "ablation"}


def test_failed_trials_leave_their_reason_and_nothing_running(small_world, tmp_path):
    arguments = ["--num-samples", "3", "--baseline-seeds", "2", "--steps", "4", "--lr", "1e30", *QUICK]
    sweep = Sweep(*arguments, *world(small_world), "--run-dir", str(tmp_path / "run"))
    status, output, errors = sweep.wait()
    assert status == 3, errors
    assert "baseline_failed" in output
    assert "NonFiniteLossError" in output
    assert "Traceback" not in output + errors
    assert sweep.left_behind() == []
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert set(trials[trials.phase == "baseline"].status) == {"failed"}
    assert "NonFiniteLossError" in (tmp_path / "run" / "logs" / "t000.log").read_text()


@pytest.mark.parametrize(("sent", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_sweep_leaves_no_process_and_a_readable_directory(small_world, tmp_path, sent, expected):
    sweep = Sweep("--num-samples", "4", "--steps", "100000", *world(small_world), "--run-dir", str(tmp_path / "run"))
    for line in sweep.process.stdout:
        if "started" in line:
            break
    sweep.process.send_signal(sent)
    status, _, errors = sweep.wait()
    assert status == expected, errors
    assert "Traceback" not in errors
    assert sweep.left_behind() == []
    assert json.loads((tmp_path / "run" / "sweep.json").read_text())["status"] == "interrupted"
    assert set(pd.read_csv(tmp_path / "run" / "trials.csv").status) == {"running"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--harmful", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--harmful", "{broken}"], "broken.jsonl:2: not JSON"),
        (["--harmful", "{runs}", "--benign", "{runs}"], "harmful"),
        (["--harmful", "{user_only}"], "scored token"),
        (["--preset", "tinny"], "--preset tinny: no such preset; did you mean tiny?"),
        (["--num-sample", "4", "--stepz", "3"], "did you mean --num-samples?"),
        (["--target-layers", "9"], "--target-layers 9: the model has hidden states 0–3"),
        (["--target-layers", "1", "--lora-layers", "2"], "no LoRA layer below it (LoRA covers blocks 2–2)"),
        (["--num-samples", "2"], "--num-samples 2: 3 baseline seeds + 1 trial to compare = 4 at least"),
        (["--run-dir", "{taken}"], "already holds a sweep"),
        (["--beta-kl", "0.5"], "--beta-kl 0.5: the sweep searches it"),
        (["--model", "/nowhere/model"], "--model /nowhere/model: no such directory"),
        (["--workers-per-trial", "3"], "--batch-size 16: does not divide among 3 workers"),
        (["--max-concurrent", "0"], "--max-concurrent 0"),
        (["--reroute-tolerance", "1.5"], "--reroute-tolerance 1.5"),
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
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["kl_ablation.py", *world(small_world), *run_dir, *arguments])
    status = cli.run(kl_ablation.main)
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert message in captured.err
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "taken" / "sweep.json").read_text() == "{}"
