"""The command: what it prints and writes, its exit codes, and one line for each bad input."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from decisions import decision_and_commands
from synthetic import BASE_HARMFUL_NLL, MakeRun, Surface, make_trials

from analysis import pick_beta
from analysis.decide import decide
from analysis.pick_beta import main, write_report
from analysis.report import commands
from analysis.report.wording import headline
from analysis.trials import load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
KEYS = {
    "schema_version",
    "verdict",
    "beta_kl",
    "kl_temperature",
    "probability_feasible",
    "eval_benign_kl",
    "drift_reduction_vs_baseline",
    "reroute_delta",
    "reroute_delta_interval",
    "n_seeds",
    "confirmed",
    "warnings",
    "rules_of_thumb",
    "train_command",
}


def decision_of(run: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in decision.json")

    return json.loads((run / "report" / "decision.json").read_text(), parse_constant=refuse)


def unfolded(lines: list[str]) -> str:
    """The text with commands over several lines put back on one."""
    return re.sub(r" \\\n +", " ", "\n".join(lines))


def one_error_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_a_choice_exits_0_and_prints_the_setting_and_the_command(
    make_run: MakeRun, trials: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(trials)
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = "Use beta_kl = 0.3 at kl_temperature = 1.0, but on one seed and behaviour not measured."
    assert " ".join(lines[:2]).startswith(said)
    train = f"python -m cbtrain.train --from-decision {run / 'report' / 'decision.json'}"
    assert unfolded(lines).endswith(f"train   {train}")
    assert train in unfolded((run / "report" / "report.md").read_text().splitlines())
    assert sum("→" in line for line in lines) == 4
    assert max(len(line) for line in lines if str(run) not in line) <= 80


def test_decision_json_is_complete_and_finite(make_run: MakeRun, trials: pd.DataFrame) -> None:
    trials.loc[0, "eval_harmful_nll"] = np.nan
    run = make_run(trials)
    decision, _ = write_report(run)
    written = decision_of(run)
    assert set(written) >= KEYS
    assert written["schema_version"] == 2
    assert written["verdict"] == decision.verdict == "choose"
    assert len(written["reroute_delta_interval"]) == 2
    assert len(written["rules_of_thumb"]) == 4
    assert set(written["rules_of_thumb"][0]) == {"rule", "fired", "evidence", "instead"}
    assert written["trials"] == {"completed": len(trials)}


def never_rerouted() -> pd.DataFrame:
    return make_trials(Surface()).assign(eval_loss_reroute=0.95)


def baseline_failed() -> pd.DataFrame:
    trials = make_trials(Surface())
    return trials.assign(status=np.where(trials["beta_kl"] == 0, "failed", "completed"))


@pytest.mark.parametrize(
    ("trials", "verdict", "first"),
    [
        (make_trials(Surface(always_lost=0.2), searched=14), "no_candidate_qualifies", "Use beta_kl = 0: "),
        (make_trials(Surface(), noise=0.08, searched=0, rng_seed=6), "insufficient_evidence", "Not enough evidence"),
        (never_rerouted(), "baseline_never_rerouted", "Cannot choose"),
        (baseline_failed(), "baseline_failed", "Cannot choose"),
    ],
)
def test_every_other_verdict_exits_3_and_says_so_first(
    make_run: MakeRun, capsys: pytest.CaptureFixture[str], trials: pd.DataFrame, verdict: str, first: str
) -> None:
    run = make_run(trials)
    assert main([str(run)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(first)
    written = decision_of(run)
    assert written["verdict"] == verdict
    if verdict == "no_candidate_qualifies":
        assert "--beta-kl 0.0" in written["train_command"]
    else:
        assert written["train_command"] is None
        assert not any("cbtrain.train" in line for line in lines)
        assert any(line.startswith("python sweeps/kl_ablation.py --preset tiny --num-samples") for line in lines)
    assert (run / "report" / "report.html").stat().st_size > 5000


def test_what_would_help_is_the_same_sweep_with_more_trials_where_its_baseline_has_seeds_enough(
    make_run: MakeRun,
) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    run = make_run(trials)
    decision, sweep = decide(trials), load_settings(run)
    assert decision.baseline is not None
    assert decision.needed is not None
    for seeds, start in ((decision.baseline.n_seeds, f"--resume {run}"), (30, "--preset tiny")):
        asked = replace(decision, needed=replace(decision.needed, seeds=seeds, num_samples=80))
        command = commands.sweep_command(asked, sweep, len(trials))
        assert command is not None
        assert command.startswith(f"python sweeps/kl_ablation.py {start} --num-samples 80"), command
        assert ("--baseline-seeds 30" in command) == (seeds == 30)
    otherwise = commands.sweep_command(replace(asked, reroute_tolerance=0.2), sweep, len(trials))
    assert otherwise is not None
    assert "--resume" not in otherwise


def test_a_baseline_that_never_rerouted_is_told_to_train_longer(make_run: MakeRun) -> None:
    run = make_run(never_rerouted())
    write_report(run)
    assert "--steps 140" in decision_of(run)["sweep_command"]


def test_the_train_command_repeats_what_the_sweep_was_told(make_run: MakeRun, trials: pd.DataFrame) -> None:
    overrides = {"model": "my model", "harmful": ["a.jsonl", "b.jsonl"], "steps": 90, "beta_kl": 9.0, "seed": 3}
    run = make_run(trials, preset="llama-3.1-8b-instruct", config_overrides=overrides)
    write_report(run)
    assert decision_of(run)["train_command"] == (
        "python -m cbtrain.train --preset llama-3.1-8b-instruct --beta-kl 0.3 --kl-temperature 1.0 "
        "--output-dir outputs/cb --model 'my model' --harmful a.jsonl b.jsonl --steps 90"
    )


def test_harmful_completions_that_return_at_every_setting_are_why_none_is_shipped(
    make_run: MakeRun, trials: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    trials.loc[trials["beta_kl"] > 0, "eval_harmful_nll"] = BASE_HARMFUL_NLL + 0.4
    run = make_run(trials)
    assert main([str(run)]) == 3
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("Ship none of these: the settings that keep rerouting within the limit break behaviour.")
    assert "harmful completions are likely again" in said
    assert "--beta-kl-range 0.0001 2" in said
    decision = decision_of(run)
    assert (decision["verdict"], decision["train_command"], decision["beta_kl"]) == ("no_setting_behaves", None, None)


def test_tolerance_and_confidence_default_to_the_sweeps_own(make_run: MakeRun, trials: pd.DataFrame) -> None:
    run = make_run(trials, settings={"num_samples": 18, "reroute_tolerance": 0.02, "confidence": 0.9})
    own, _ = decision_and_commands(run)
    assert (own.reroute_tolerance, own.confidence) == (0.02, 0.9)
    loose, _ = decision_and_commands(run, reroute_tolerance=0.2, confidence=0.8)
    assert (loose.reroute_tolerance, loose.confidence) == (0.2, 0.8)
    assert loose.eval_benign_kl < own.eval_benign_kl


def test_a_sweep_in_progress_is_decided_on_what_is_there(make_run: MakeRun, trials: pd.DataFrame) -> None:
    trials.loc[[12, 13], "status"] = ["running", "failed"]
    trials.loc[[12, 13], ["eval_loss_reroute", "eval_benign_kl"]] = np.nan
    run = make_run(trials)
    write_report(run)
    assert decision_of(run)["trials"] == {"completed": 16, "running": 1, "failed": 1}
    assert "16 completed, 1 running, 1 failed" in (run / "report" / "report.md").read_text()


def test_a_sweep_that_has_not_ended_does_not_sound_final_and_goes_on_with_itself(
    make_run: MakeRun, trials: pd.DataFrame, capsys: pytest.CaptureFixture[str]
) -> None:
    trials.loc[12, "status"] = "running"
    run = make_run(trials, settings={"num_samples": 20}, status="running")
    assert main([str(run)]) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("So far (17 of 20, 1 running): Use beta_kl = 0.3")
    assert f"python analysis/pick_beta.py {run}" in unfolded(lines), "there is nothing to do but to look again"
    assert "cbtrain.train" not in "\n".join(lines)
    assert decision_of(run)["train_command"] is None
    assert main([str(run), "--so-far"]) == 4
    assert "--despite-verdict" in unfolded(capsys.readouterr().out.splitlines())
    assert decision_of(run)["so_far"] == "17 of 20, 1 running"


def test_a_sweep_has_ended_when_it_says_so_and_not_before(make_run: MakeRun, trials: pd.DataFrame) -> None:
    planned = {"num_samples": 20}
    killed = make_run(trials, settings=planned, status="interrupted")
    assert decision_and_commands(killed)[0].so_far == "18 of 20"
    never = trials.iloc[:3].assign(eval_loss_reroute=0.999)
    assert decision_and_commands(make_run(never, settings=planned, status="finished"))[0].so_far == ""
    decision, following = decision_and_commands(make_run(never, settings=planned, status="running"))
    assert headline(decision).startswith("So far (3 of 20): Cannot choose beta_kl")
    assert following.next.startswith("python analysis/pick_beta.py")
    measuring = make_run(trials, settings={"num_samples": 18}, status="running")
    assert decision_and_commands(measuring)[0].so_far == "18 of 18, behaviour to come"


def test_what_was_asked_beside_the_sweep_is_asked_again_in_the_next_one(make_run: MakeRun) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    run = make_run(trials, flags={"max_degenerate_rise": 0.2, "max_compliance_rise": 0.1})
    _, following = decision_and_commands(run, reroute_tolerance=0.01)
    assert "--reroute-tolerance 0.01" in following.next
    assert "--max-degenerate-rise 0.2" in following.next
    assert "--max-compliance-rise" not in following.next


def test_warnings_are_printed_whatever_the_verdict(make_run: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    trials = make_trials(Surface(), noise=0.08, searched=0, rng_seed=6)
    trials.loc[trials["trial_id"] == "t001", "eval_loss_reroute"] = 0.97
    main([str(make_run(trials))])
    output = " ".join(capsys.readouterr().out.split())
    assert "warning: 1 of 4 baseline seeds never rerouted as the others did (t001, seed 1" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}/nowhere"], "no such directory"),
        (["{run}", "--confidance", "0.9"], "--confidance: no such argument; did you mean --confidence?"),
        (["{run}", "--zzz"], "--zzz: no such argument; one of"),
        (["{run}", "another"], "another: no such argument"),
        (["{run}", "--confidence", "x"], "--confidence: invalid float value: 'x'"),
        (["{run}", "--confidence", "1.5"], "--confidence 1.5: must lie"),
        (["{run}", "--reroute-tolerance", "nan"], "--reroute-tolerance nan: must lie"),
    ],
)
def test_bad_arguments_exit_2_with_one_line(
    make_run: MakeRun,
    trials: pd.DataFrame,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    run = make_run(trials)
    assert main([argument.format(run=run) for argument in arguments]) == 2
    assert message in one_error_line(capsys)
    assert not (run / "report").exists()


@pytest.mark.parametrize("damage", ["no trials.csv", "corrupt csv", "no sweep.json", "report is a file"])
def test_a_broken_run_directory_exits_2_with_one_line(
    make_run: MakeRun, trials: pd.DataFrame, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    run = make_run(trials)
    if damage == "no trials.csv":
        (run / "trials.csv").unlink()
    elif damage == "corrupt csv":
        (run / "trials.csv").write_text((run / "trials.csv").read_text()[:-40])
    elif damage == "no sweep.json":
        (run / "sweep.json").unlink()
    else:
        (run / "report").write_text("mine")
    assert main([str(run)]) == 2
    assert str(run) in one_error_line(capsys)


def test_ctrl_c_exits_130(make_run: MakeRun, trials: pd.DataFrame, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pick_beta, "decide_with_model", interrupted)
    assert main([str(make_run(trials))]) == 130


def test_the_command_runs_uninstalled_from_anywhere(make_run: MakeRun, trials: pd.DataFrame, tmp_path: Path) -> None:
    run = make_run(trials)
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "analysis" / "pick_beta.py"), str(run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Use beta_kl")
    assert done.stderr == ""
