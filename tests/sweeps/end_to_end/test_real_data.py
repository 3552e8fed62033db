"""Full small sweeps on real data, where it lies beside the project: the command, then the report."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from chat_tokenizers import LLAMA31, bpe_tokenizer
from commands import ROOT, TINY, Sweep
from worlds import save_llama

from sweeps.execution.driver import EXIT_STATUS

DATA = ROOT.parent / "shared" / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="real data, which is no part of the project, is not here")
TRAINING = (
    *TINY,
    *("--target-layers", "2", "3", "--lora-init-std", "0.1"),
    *("--steps", "6", "--batch-size", "4", "--lr", "5e-3", "--warmup-steps", "2", "--eval-every", "0"),
)
"""An adapter that starts far from 0 reroutes within six steps."""


def random_llama(directory: Path, vocabulary: int | None = None) -> Path:
    """Four layers of random weights with a Llama-3.1 chat template; tokens that mean nothing fill the vocabulary."""
    tokenizer = bpe_tokenizer(LLAMA31)
    if vocabulary:
        tokenizer.add_tokens([f"<x{i}>" for i in range(vocabulary - len(tokenizer))])
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "initializer_range": 0.1}
    save_llama(directory, tokenizer, **shape)
    return directory


def sweep_and_report(tmp_path: Path, *arguments: str) -> pd.DataFrame:
    """The sweep's trials, when both commands have ended well and the report is there."""
    sweep = Sweep(tmp_path, *arguments, *TRAINING, "--run-dir", "run", "--no-calibrate", "--behaviour-prompts", "2")
    status, output, errors = sweep.wait()
    assert (status in (0, 3), errors) == (True, ""), output + errors
    report = [sys.executable, str(ROOT / "analysis" / "pick_beta.py"), "run"]
    done = subprocess.run(report, cwd=tmp_path, capture_output=True, text=True, check=False)
    decision = json.loads((tmp_path / "run" / "report" / "decision.json").read_text())
    assert status == EXIT_STATUS.get(decision["verdict"], 0), output
    assert done.returncode == (0 if decision["verdict"] == "choose" else 3), done.stderr
    assert (tmp_path / "run" / "report" / "report.html").stat().st_size > 10_000
    trials = pd.read_csv(tmp_path / "run" / "trials.csv")
    assert set(trials.status) == {"completed"}, trials.error
    assert (tmp_path / "run" / "trials" / "t000" / "behaviour.json").is_file(), output
    return trials


def test_agentdojo_both_files_to_both_sides(tmp_path):
    model = random_llama(tmp_path / "llama")
    files = [str(path) for path in sorted((DATA / "agentdojo").glob("*.jsonl"))]
    assert len(files) == 2
    sides = ["--harmful", *files, "--benign", *files, "--max-length", "512"]
    trials = sweep_and_report(tmp_path, "--model", str(model), *sides, "--num-samples", "6")
    assert len(trials) == 6
    assert trials.eval_loss_reroute.max() < 0.5


def test_rows_tokenised_elsewhere_with_their_own_masks(tmp_path):
    model, data = random_llama(tmp_path / "llama", vocabulary=128_256), DATA / "pretokenised"
    sides = [
        word
        for side, name in (("harmful", "cb"), ("benign", "retain"))
        for word in (f"--{side}", *(str(data / f"{part}_{name}.jsonl") for part in ("renders", "lossmasks")))
    ]
    sweep = ["--model", str(model), *sides, "--mask-policy", "given", "--num-samples", "3", "--baseline-seeds", "2"]
    assert len(sweep_and_report(tmp_path, *sweep)) == 3
