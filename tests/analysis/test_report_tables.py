"""The report's tables: means, pairs and reasons are those of the trials."""

import math
import re

import pandas as pd
import pytest
from golden_runs import golden_run, told_whole
from synthetic import Surface, failing, make_trials, repeated

from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide
from analysis.formatting import number, signed
from analysis.report.completions import compared, load_completions, next_best_measured
from analysis.report.provenance import provenance
from analysis.report.report import _cell
from analysis.report.tables import ablation, every_trial, low_weights, paired_seeds
from analysis.trials import load_trials

PICK = (0.3, 1.0)


@pytest.fixture
def sweep() -> pd.DataFrame:
    return told_whole(repeated(make_trials(Surface()), PICK, (2, 3)))


def test_the_five_points_are_means_over_their_trials_against_the_baseline_of_their_seeds(sweep: pd.DataFrame) -> None:
    rows = {row.name: row for row in ablation(sweep, decide(sweep))}
    assert list(rows) == ["beta_kl 0", "beta_kl 0.1, T 1.0", "beta_kl 0.3, T 1.0", "beta_kl 0.5, T 1.0",
                          "beta_kl 0.3, T 2.0"]  # fmt: skip
    own = sweep[(sweep["beta_kl"] == 0.3) & (sweep["kl_temperature"] == 1.0)]
    assert sorted(own["seed"]) == [0, 2, 3]
    baseline = sweep[(sweep["beta_kl"] == 0) & sweep["seed"].isin([0, 2, 3])]
    loss, base = own["loss_kl"].mean(), baseline["loss_kl"].mean()
    drift = math.prod(own["eval_benign_kl"]) ** (1 / 3)
    lost = (own.set_index("seed")["eval_loss_reroute"] - baseline.set_index("seed")["eval_loss_reroute"]).mean()
    cells = rows["beta_kl 0.3, T 1.0"].cells
    assert cells[2] == f"{number(loss)} (× {number(loss / base, 2)})"
    assert cells[3].startswith(f"{number(drift)} (× ")
    assert cells[4] == signed(lost)
    assert rows["beta_kl 0.3, T 1.0"].is_pick
    assert rows["beta_kl 0.3, T 1.0"].judged.startswith("keeps the limit, P ")
    assert rows["beta_kl 0.5, T 1.0"].judged.startswith("loses too much, P ")


def test_a_pick_that_is_none_of_the_five_is_the_last_row(sweep: pd.DataFrame) -> None:
    decision = decide(sweep[sweep["beta_kl"] != 0.3].reset_index(drop=True))
    assert decision.verdict == "choose"
    last = ablation(sweep, decision)[-1]
    assert (last.is_pick, last.name.split(",")[0]) == (True, f"beta_kl {number(decision.beta_kl or 0)}")


def test_the_weights_that_are_usually_advised_are_judged(sweep: pd.DataFrame) -> None:
    said = low_weights(decide(sweep))
    assert said.startswith("“beta_kl 0.1 to 0.5” at T 1: 0.1, 0.3 hold here; 0.5 do not: too much lost, ")
    assert said.endswith(" The pick lies among them.")
    without = sweep[(sweep["beta_kl"] < 0.1) | (sweep["beta_kl"] > 0.5) | (sweep["kl_temperature"] > 1)]
    assert "nothing can be said" in low_weights(decide(without.reset_index(drop=True)))


def test_pairs_are_of_one_seed_and_name_who_failed(sweep: pd.DataFrame) -> None:
    failed = failing(sweep, "t101", "t002")
    pairs = {pair.seed: pair for pair in paired_seeds(failed, decide(failed))}
    assert sorted(pairs) == [0, 2, 3]
    by_id = failed.set_index("trial_id")
    assert pairs[0].lost == pytest.approx(by_id.eval_loss_reroute["t005"] - by_id.eval_loss_reroute["t000"])
    assert pairs[0].within is True
    assert pairs[2].said == "its baseline most likely failed"
    assert pairs[3].said == "this trial most likely failed"
    assert pairs[3].within is False
    assert paired_seeds(failed.iloc[:4], decide(failed.iloc[:4])) == []


def test_every_trial_has_its_row_and_reason(sweep: pd.DataFrame) -> None:
    sweep.loc[10, ["status", "error"]] = "failed", "out of memory"
    sweep.loc[10, "eval_benign_kl"] = float("nan")
    sweep = failing(sweep, "t004")
    decision = decide(sweep)
    rows = {row.trial_id: row for row in every_trial(sweep, decision)}
    assert len(rows) == len(sweep)
    assert (rows["t010"].said, rows["t010"].status) == ("out of memory", "failed")
    assert math.isnan(rows["t010"].drift)
    assert rows["t004"].said.startswith("suspect: reroute +0.9")
    assert rows["t005"].is_pick


def test_provenance_tells_what_was_written_down_and_nothing_else(sweep: pd.DataFrame) -> None:
    record = {
        "run_dir": "runs/a",
        "searched": "all",
        "config": {"model": "models/llama", "dtype": "bfloat16", "harmful": ["h.jsonl"], "benign": ["b.jsonl"]},
        "inputs": {"h.jsonl": "a" * 64, "b.jsonl": "b" * 64, "models/llama/model.safetensors": "c" * 64},
        "rows": {"harmful": {"train": 1200, "held_out": 30}},
        "workers": {"count": 2, "cpus": 3, "gpus": 1.0},
        "concurrency": 2,
        "hardware": {"cpu": "8 cores of X", "gpu": "2 × Y"},
        "wall_s": 7500.0,
        "versions": {"torch": "2"},
        "git_commit": "0123456789abcdef",
    }
    said = dict(provenance(record, sweep.assign(wall_s=3600.0)))
    assert said["model"] == "models/llama, bfloat16 (SHA-256 cccccccccccc…)"
    sampled = record | {"inputs": {"models/llama/model.safetensors": "sampled " + "d" * 64}}
    assert dict(provenance(sampled, sweep))["model"] == "models/llama, bfloat16 (SHA-256 sampled dddddddddddd…)"
    assert said["data"] == "b.jsonl (SHA-256 bbbbbbbbbbbb…)"
    assert said["rows"] == "harmful 1,200 train, 30 held out"
    assert said["hardware"] == "8 cores of X, 2 × Y, 2 workers a trial of 3 CPUs and 1 GPU, 2 at a time"
    assert said["wall time"] == "2.1 h"
    trials = len(sweep)
    assert said["cost of the trials"].startswith(
        f"{number(trials * 6, 2)} CPU-hours, {number(trials * 2, 2)} GPU-hours"
    )
    assert said["software"] == "torch 2, commit 0123456789ab"
    assert "preset" not in said


def test_of_completions_what_is_damaged_is_left_out_and_the_next_best_is_compared(tmp_path) -> None:
    run = golden_run(tmp_path / "run", "choose")
    path = run / "trials" / "t005" / "completions.jsonl"
    good = path.read_text().splitlines()
    text = "\n".join(
        [*good[:4], '{"kind": "benign"', '{"kind": "benign", "source": 3}', "null", good[5][:40], *good[8:]]
    )
    path.write_text(text.replace('"Answer 9', "5"), encoding="utf-8")
    trials = load_trials(run)
    behaviour = load_behaviour(run, trials)
    decision = decide(trials, behaviour=behaviour)
    shown = {group.kind: group for group in load_completions(run, behaviour, decision)}
    assert len(shown["harmful"].prompts) == 4, "those that all three models have"
    assert len(shown["benign"].prompts) == 6
    assert [each.trial_id for each in compared(behaviour, decision)] == ["t000", "t005", "t004"]
    assert next_best_measured(behaviour, decision) == (decision.settings[1].beta_kl == 0.1)
    assert max(len(answer.text) for group in shown.values() for p in group.prompts for answer in p.answers) <= 202


@pytest.mark.parametrize("text", ["a | b", "<img>", "[x](y)", "*b*", "# h\n# i", "`c`", "back\\|slash"])
def test_a_text_in_markdown_is_that_text(text: str) -> None:
    line = _cell(text)
    assert "\n" not in line
    assert "<" not in line
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`\[*#]", line), line
