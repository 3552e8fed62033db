"""Calibrated sweeps on three architectures whose hidden states are of very different size.

    python -m tests.benchmarks.bench_scales [--directory DIR]

A small Qwen3, a Llama and a GPT-NeoX are pre-trained on the tiny world's text like the embedded default (half a minute
each); then what is written to their hidden states is multiplied by 0.03, 1 and 30, which changes no logit. A sweep of
20 trials under `--preset auto` calibrates on each. What is printed: the teacher's norms, what calibration found, and
the means of baseline and of the trials with KL; the same Llama at all three scales besides, where nothing but the scale
differs. Blocks, targets and held-out half are the embedded default's: of four blocks the published shares leave one
adapted block too few to tell its questions apart, and of seven held-out rows one or two decide.

Two x86-64 cores, torch 2.13, 2026-11-26, the Llama at 0.03 and 30 on another such machine a day later; means (standard
deviations) of 4 and 16 trials. Norms at the targets: 0.8 and 1.1, 32 and 41, 377 and 553, 0.9 and 1.5, 875 and 1520:

| model × scale | recipe | without KL: reroute, drift | with KL |
|---|---|---|---|
| qwen3 × 0.03 | lr 0.001 scale 3 | 0.0084 (0.0003), 0.049 (0.051) | 0.016 (0.008), 0.0036 (0.0023) |
| llama × 1 | lr 0.01 scale 3 | 0.0008 (0.0008), 0.0082 (0.0064) | 0.0005 (0.0004), 0.0013 (0.0007) |
| gpt_neox × 30 | lr 0.01 scale 10 | 0.058 (0.004), 0.0002 (0.00004) | 0.085 (0.032), 0.0001 (0.00004) |
| llama × 0.03 | lr 0.001 scale 10 steps 70 | 0.084 (0.035), 0.0039 (0.0010) | 0.110 (0.036), 0.0027 (0.0007) |
| llama × 30 | lr 0.01 scale 10 steps 70 | 0.0029 (0.0024), 0.0004 (0.0001) | 0.0038 (0.0031), 0.0004 (0.0001) |

All reroute. They do not agree within seed noise: the retain term knows the scale, the learning rate does not (an update
of one size is larger beside smaller weights), so calibration ends at another one, and at the first that converges.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.helpers.scaled_stream import scale_hidden_states

ROOT = Path(__file__).parents[2]
CASES = (("qwen3", 0.03), ("llama", 1.0), ("gpt_neox", 30.0), ("llama", 0.03), ("llama", 30.0))
TRIALS = 20
METRICS = ("eval_loss_reroute", "eval_benign_kl", "eval_harmful_nll", "eval_benign_nll")
RECIPE = "--target-layers 2 3 --lora-layers 0 1 2 --batch-size 16 --eval-fraction 0.5 --dtype float32 --steps 70"
SHAPE = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4}


def architectures() -> dict[str, Callable[[PreTrainedTokenizerFast], PreTrainedModel]]:
    """What makes a model of random weights, by name."""
    makers = {
        "llama": (LlamaConfig, LlamaForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"num_key_value_heads": 2, "head_dim": 16}),
        "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    }
    return {
        name: lambda tokenizer, shape=shape, kind=kind, model=model: model(
            kind(
                **(SHAPE | shape),
                vocab_size=len(tokenizer),
                max_position_embeddings=256,
                tie_word_embeddings=True,
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        for name, (kind, model, shape) in makers.items()
    }


def main() -> None:
    """Pre-train, sweep, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, default=Path("runs/scales"))
    directory: Path = parser.parse_args().directory
    print("| model | scale | norms | recipe | trials |", " | ".join(METRICS), "|", flush=True)
    print("|---|---|---|---|---|" + "---|" * len(METRICS))
    for name, scale in CASES:
        run_dir = directory / f"run-{name}-{scale:g}"
        sweep(written(directory, name, scale), run_dir)
        report(name, scale, run_dir)


def written(directory: Path, name: str, scale: float) -> Path:
    """The pre-trained model's directory at a scale."""
    from cbtrain.model import tiny

    target, unscaled = directory / f"{name}-{scale:g}", directory / name
    tokenizer = tiny.make_tokenizer()
    if not unscaled.is_dir():
        tiny.pretrain(architectures()[name], tokenizer).save_pretrained(unscaled)
    model = AutoModelForCausalLM.from_pretrained(unscaled)
    scale_hidden_states(model, scale)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def sweep(model: Path, run_dir: Path) -> None:
    """The calibrated sweep, its output beside its run."""
    from cbtrain.model import tiny

    world = tiny.build()
    sides = ["--harmful", str(world / "harmful.jsonl"), "--benign", str(world / "benign.jsonl")]
    command = [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), "--model", str(model), *sides, *RECIPE.split()]
    command += ["--num-samples", str(TRIALS), "--behaviour-prompts", "0", "--run-dir", str(run_dir)]
    with run_dir.with_name(f"{run_dir.name}.log").open("w") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)


def report(name: str, scale: float, run_dir: Path) -> None:
    """Two lines of the table: without KL and with."""
    calibration = json.loads((run_dir / "calibration.json").read_text())
    if not calibration["converged"]:
        print(f"| {name} | {scale:g} | {calibration['reason']} |", flush=True)
        return
    trials = pd.read_csv(run_dir / "trials.csv")
    norms = " ".join(f"{norm:.3g}" for norm in calibration["config"]["retain_norms"])
    recipe = " ".join(f"{setting} {value:g}" for setting, value in calibration["settings"].items())
    for kind, of_kind in trials.groupby(trials.beta_kl > 0):
        cells = [f"{of_kind[metric].mean():.4g} ({of_kind[metric].std():.2g})" for metric in METRICS]
        label = f"{len(of_kind)} {'with' if kind else 'without'} KL"
        print(f"| {name} | {scale:g} | {norms} | {recipe} | {label} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
