"""The command that trains one model: what it shows, tracks and leaves behind, and training what a sweep chose."""

import json
import logging
import os
import subprocess
import sys
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path

import pytest
import torch
from commands import TINY
from offline_wandb import offline_parts
from rich.console import Console
from transformers import AutoModelForCausalLM

from cbtrain import train
from cbtrain.config import InputError
from cbtrain.config.saved import config_of_decision
from cbtrain.training import loop
from cbtrain.training.console import TrainingConsole
from cbtrain.utils.metrics_file import read_metrics
from cbtrain.utils.tracking import open_tracker

RELOAD = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, ids, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
torch.save(model(torch.load(ids)).logits, out)
"""


@pytest.fixture(autouse=True)
def warnings_as_they_were():
    """The command has the process log its warnings."""
    yield
    logging.captureWarnings(False)


@pytest.fixture
def arguments(small_config, tmp_path) -> list[str]:
    data = ["--model", small_config.model, "--harmful", *small_config.harmful, "--benign", *small_config.benign]
    return [
        *data,
        *TINY,
        "--steps",
        "4",
        "--warmup-steps",
        "1",
        "--eval-every",
        "2",
        "--output-dir",
        str(tmp_path / "out"),
    ]


@pytest.fixture
def decided(small_config, tmp_path):
    """A function that writes a sweep's run directory with a decision in it, and gives the decision's path."""

    def write(verdict: str = "choose", beta_kl: float | None = 0.7, **fields: object) -> Path:
        report = tmp_path / "run" / "report"
        report.mkdir(parents=True)
        told = {"model": small_config.model, "harmful": small_config.harmful, "benign": small_config.benign, "steps": 4}
        sweep = {"preset": "tiny", "config": asdict(small_config) | fields, "config_overrides": told}
        (tmp_path / "run" / "sweep.json").write_text(json.dumps(sweep))
        heat = None if beta_kl is None else 2.0
        more = {"sweep_command": "python sweeps/kl_ablation.py --num-samples 40"} if beta_kl is None else {}
        decision = {"verdict": verdict, "beta_kl": beta_kl, "kl_temperature": heat, **more}
        (report / "decision.json").write_text(json.dumps(decision))
        return report / "decision.json"

    return write


def test_the_adapter_reloads_by_plain_peft_in_another_process_with_the_trained_models_logits(
    arguments, small_config, tmp_path, monkeypatch
):
    ids = torch.arange(24).reshape(2, 12)
    logits, save = {}, loop.save_adapter

    def remember(model, directory, config):
        model.eval()
        with torch.no_grad():
            logits["trained"] = model(ids).logits
        save(model, directory, config)

    monkeypatch.setattr(loop, "save_adapter", remember)
    assert train.main([*arguments, "--lr", "0.02"]) == 0
    torch.save(ids, tmp_path / "ids.pt")
    places = [small_config.model, tmp_path / "out" / "adapter", tmp_path / "ids.pt", tmp_path / "logits.pt"]
    subprocess.run([sys.executable, "-c", RELOAD, *map(str, places)], check=True, timeout=120)
    apart = (torch.load(tmp_path / "logits.pt") - logits["trained"]).abs().max().item()
    base = AutoModelForCausalLM.from_pretrained(small_config.model, dtype=torch.float32)
    with torch.no_grad():
        moved = (base(ids).logits - logits["trained"]).abs().max().item()
    assert apart <= 1e-5, apart
    assert moved > 1e-2, f"training moved the logits by {moved} only, so their equality says nothing"


def test_a_decision_brings_the_preset_the_data_and_the_fields_of_its_sweep(decided, small_config, capsys, tmp_path):
    file = decided(batch_size=6)
    assert train.main(["--from-decision", str(file), "--lr", "0.0005", "--output-dir", str(tmp_path / "out")]) == 0
    trained = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = asdict(small_config) | {"batch_size": 6, "beta_kl": 0.7, "kl_temperature": 2.0, "lr": 0.0005}
    assert trained == json.loads(json.dumps(expected))
    assert "trained 4 steps" in capsys.readouterr().out


def test_what_the_sweep_was_not_told_comes_from_the_preset_not_from_another_machines_path(decided, tmp_path):
    file = decided(model="/cache/of/another/machine/tiny", harmful=["/gone.jsonl"])
    sweep = json.loads((tmp_path / "run" / "sweep.json").read_text())
    (tmp_path / "run" / "sweep.json").write_text(json.dumps(sweep | {"config_overrides": {}}))
    config = config_of_decision(file)
    assert (config.model, config.harmful, config.benign) == ("tiny", (), ())
    assert config.beta_kl == 0.7


def test_a_decision_of_the_first_schema_is_read(decided):
    file = decided()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 1, "seed_rules": {"agrees": True}}))
    assert (config_of_decision(file).beta_kl, config_of_decision(file).kl_temperature) == (0.7, 2.0)


def test_no_candidate_qualifies_trains_without_a_kl_term(decided):
    file = decided("no_candidate_qualifies", 0.0)
    with pytest.raises(
        InputError, match="no_candidate_qualifies, no choice; --despite-verdict trains beta_kl 0 anyhow"
    ):
        config_of_decision(file)
    assert config_of_decision(file, despite_verdict=True).beta_kl == 0.0


def test_a_choice_of_a_sweep_that_goes_on_is_trained_only_where_that_is_asked_for(decided):
    file = decided()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"so_far": "9 of 20"}))
    with pytest.raises(InputError, match=r"of a sweep that has not ended \(9 of 20\); --despite-verdict"):
        config_of_decision(file)
    assert config_of_decision(file, despite_verdict=True).beta_kl == 0.7


def test_what_a_decision_warns_of_is_printed_before_it_is_trained(decided, capsys, tmp_path):
    file = decided()
    said = {"sentence": "Use it, but behaviour not measured.", "warnings": ["KL does not lower benign drift here."]}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    assert train.main(["--from-decision", str(file), "--output-dir", str(tmp_path / "out")]) == 0
    output = capsys.readouterr().out
    assert output.startswith("Use it, but behaviour not measured.\nwarning: KL does not lower benign drift here.\n")


@pytest.mark.parametrize("verdict", ["insufficient_evidence", "baseline_never_rerouted", "baseline_failed"])
def test_a_decision_without_a_setting_is_refused_with_what_would_help(decided, verdict):
    with pytest.raises(InputError, match=rf"chose nothing \({verdict}\); .*--num-samples 40") as refused:
        train.main(["--from-decision", str(decided(verdict, None))])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "sweep.json").unlink(), r"sweep\.json: No such file"),
        (lambda run: (run / "sweep.json").write_text("{}"), r"not the sweep\.json"),
        (lambda run: (run / "report" / "decision.json").write_text("{"), r"decision\.json: not JSON"),
        (lambda run: (run / "report" / "decision.json").write_text("{}"), "no verdict"),
    ],
)
def test_a_broken_decision_is_one_line(decided, tmp_path, spoil, message):
    file = decided()
    spoil(tmp_path / "run")
    with pytest.raises(InputError, match=message):
        train.main(["--from-decision", str(file), "--output-dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_field_that_this_version_lacks_is_named(decided):
    with pytest.raises(InputError, match=r"another version .*half_life"):
        config_of_decision(decided(half_life=3))


def test_a_recorded_field_of_a_wrong_type_is_named(decided):
    with pytest.raises(InputError, match=r"sweep\.json: .*--lora-rank 8: must be a whole number"):
        config_of_decision(decided(lora_rank="8"))


def test_a_preset_beside_a_decision_is_refused(decided):
    with pytest.raises(InputError, match="--from-decision brings the sweep's own"):
        train.main(["--from-decision", str(decided()), "--config=tiny"])


def test_on_a_terminal_a_bar_counts_every_step_below_the_lines():
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    losses = {"loss": 1.0, "loss_reroute": 0.5, "loss_retain": 0.2, "loss_kl": 0.1, "cs": 9.0}
    with TrainingConsole(40, console) as screen:
        for step in (1, 10, 11):
            screen.report({"step": step, **losses})
            screen.advance(step)
    shown = stream.getvalue()
    assert "11/40" in shown
    assert "Step 10: loss=1.0000, reroute=0.5000, retain=0.2000, kl=0.1000, α=9.0000" in shown
    assert "Step 11" not in shown


def test_off_a_terminal_there_are_lines_and_nothing_else():
    stream = StringIO()
    losses = {"loss": 1.0, "loss_reroute": 0.5, "loss_retain": 0.2, "loss_kl": 0.1, "cs": 9.0}
    with TrainingConsole(40, Console(file=stream, width=20)) as screen:
        screen.report({"step": 10, **losses})
        screen.advance(10)
    assert stream.getvalue() == "Step 10: loss=1.0000, reroute=0.5000, retain=0.2000, kl=0.1000, α=9.0000\n"


@pytest.fixture
def no_login(tmp_path, monkeypatch):
    """W&B without a key, and with what it sets in the environment taken back."""
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def test_wandb_logs_a_run_offline_without_a_login_and_says_nothing(arguments, tmp_path, no_login, capfd):
    assert train.main([*arguments, "--wandb-project", "p", "--wandb-mode", "offline"]) == 0
    (logged,) = (tmp_path / "out").glob("wandb/offline-run-*/run-*.wandb")
    names = (b"eval_benign_kl", b"loss_reroute", b"kl_temperature", b"tokens_per_s")
    deadline = time.monotonic() + 30
    while lacking := [name for name in names if name not in logged.read_bytes()]:
        # W&B's own process may write the end of the file after the run was finished.
        assert time.monotonic() < deadline, lacking
        time.sleep(0.05)
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "wandb" not in shown.out.replace(str(tmp_path), "")


def test_a_run_that_is_resumed_goes_on_as_the_same_run_on_wandb_and_a_new_one_does_not(
    arguments, tmp_path, no_login, monkeypatch
):
    monkeypatch.setenv("WANDB_RUN_ID", "everyones")
    arguments = [*arguments, "--checkpoint-every", "2", "--wandb-project", "p", "--wandb-mode", "offline"]
    for more in ([], ["--resume"]):
        assert train.main([*arguments, *more]) == 0
        time.sleep(1)  # directories are named by the second
    first, resumed = offline_parts(tmp_path / "out")
    assert (resumed.id, resumed.name, resumed.job_type) == (first.id, "out", "train")
    steps = [line["step"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")]
    for part in (first, resumed):
        assert [line["_step"] for line in part.history] == steps == [1, 2, 3, 4]
    (tmp_path / "out" / "metrics.jsonl").unlink()
    assert train.main(arguments) == 0
    assert len({part.id for part in offline_parts(tmp_path / "out")}) == 2


def test_a_wandb_failure_is_one_line_and_the_run_is_trained(arguments, tmp_path, no_login, capfd):
    assert train.main([*arguments, "--wandb-project", "p"]) == 0
    refused = "W&B: not tracked (no API key; run `wandb login`, or give --wandb-mode offline)"
    assert capfd.readouterr().err.splitlines() == [refused]
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_tracker_that_fails_while_it_runs_says_so_once_and_drops_the_rest(tmp_path, no_login, capfd):
    with open_tracker(
        "p", "offline", group="g", name="n", directory=tmp_path, config={"a": (1, 2)}, job_type="x"
    ) as tracker:
        tracker.log({"loss": 1.0}, 1)
        tracker.figure("gone", tmp_path / "gone.svg")
        tracker.log({"loss": 0.5}, 2)
        tracker.summary({"verdict": "choose"})
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("W&B: not tracked (")
    assert "gone.svg" in lines[0]
