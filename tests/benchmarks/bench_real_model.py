"""A sweep on a real pretrained model from nothing to its answer, then the answer put to the test on fresh seeds.

    python -m tests.benchmarks.bench_real_model --model DIR --harmful F --benign F [--preset P] [--run-dir RUN]

Runs calibration (where the preset asks for it), the sweep and the report as a user would. Then the baseline, the pick
and two losers are trained on three seeds that the sweep has not had: the qualified setting with the most drift, and the
one with the least drift of those that did not qualify. With a run directory that holds a finished sweep only the latter
is done, and of that only what had not ended. What is printed: each setting's means over the seeds, what baseline and
pick write, whether the decision was right, wall time and CPU time of the whole machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
FRESH_SEEDS = (1000, 1001, 1002)
SHOWN_ANSWERS = 3
SHOWN_CHARACTERS = 160
METRICS = {
    "reroute": "eval_loss_reroute",
    "drift": "eval_benign_kl",
    "harmful NLL": "eval_harmful_nll",
    "benign NLL": "eval_benign_nll",
    "top-1": "eval_benign_top1_agreement",
}
Setting = tuple[float, float]


def main() -> None:
    """Sweep, decide, and try the decision."""
    arguments, rest = parsed()
    started, cpu = time.monotonic(), _cpu()
    if not (arguments.run_dir / "report" / "decision.json").is_file():
        sweep(arguments, rest)
    swept, spent = time.monotonic() - started, _cpu()
    print(f"sweep and report: {swept / 60:.1f} min wall, {(spent - cpu) / 60:.1f} min CPU\n")
    decision = json.loads((arguments.run_dir / "report" / "decision.json").read_text())
    print(decision["sentence"], decision["explanation"], sep="\n")
    settings = chosen_and_losers(decision)
    results = {name: trained(arguments.run_dir, setting) for name, setting in settings.items()}
    table(settings, results)
    answers(arguments.run_dir, settings)
    verdict(decision, results)
    print(f"\nall: {(time.monotonic() - started) / 60:.1f} min wall, {(_cpu() - cpu) / 60:.1f} min CPU")


def parsed() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and those that are the sweep's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--harmful", nargs="+", required=True)
    parser.add_argument("--benign", nargs="+", required=True)
    parser.add_argument("--preset", default="auto")
    parser.add_argument("--num-samples", type=int, default=20)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/real_model"))
    return parser.parse_known_args()


def sweep(arguments: argparse.Namespace, rest: list[str]) -> None:
    """The two commands of a user; their output is shown as it comes."""
    sides = ["--harmful", *arguments.harmful, "--benign", *arguments.benign]
    whole = ["--model", arguments.model, "--preset", arguments.preset, "--num-samples", str(arguments.num_samples)]
    command = [sys.executable, str(ROOT / "sweeps" / "kl_ablation.py"), *whole, *sides, *rest]
    subprocess.run([*command, "--run-dir", str(arguments.run_dir)], check=True)
    subprocess.run([sys.executable, str(ROOT / "analysis" / "pick_beta.py"), str(arguments.run_dir)], check=True)


def chosen_and_losers(decision: dict[str, Any]) -> dict[str, Setting]:
    """The settings to try, by what they were to the decision."""
    found: dict[str, Setting] = {"without KL": (0.0, 1.0)}
    if decision["beta_kl"]:
        found["pick"] = (decision["beta_kl"], decision["kl_temperature"])
    qualified = [each for each in decision["settings"] if each["qualifies"]][1:]
    others = [each for each in decision["settings"] if not each["qualifies"]]
    if qualified:
        found["qualified, most drift"] = _of(max(qualified, key=lambda each: each["drift"]))
    if others:
        found["not qualified, least drift"] = _of(min(others, key=lambda each: each["drift"]))
    return found


def trained(run_dir: Path, setting: Setting) -> list[dict[str, Any]]:
    """A setting's metrics on each fresh seed, with what the first seed's model writes."""
    from cbtrain.config import CircuitBreakerConfig
    from cbtrain.evaluation.behaviour import measure
    from cbtrain.training.loop import train
    from cbtrain.utils.metrics_file import read_metrics

    recorded = json.loads((run_dir / "sweep.json").read_text())["config"]
    lists = {name: tuple(value) if isinstance(value, list) else value for name, value in recorded.items()}
    config = replace(CircuitBreakerConfig(**lists), beta_kl=setting[0], kl_temperature=setting[1], checkpoint_every=0)
    cache, found = run_dir / "teacher_cache", list[dict[str, Any]]()
    for seed in FRESH_SEEDS:
        directory = _directory(run_dir, setting, seed)
        of_seed = replace(config, seed=seed)
        if not (directory / "adapter").is_dir():  # written last
            train(of_seed, directory, lambda _metrics: None, teacher_cache=cache if cache.is_dir() else None)
        metrics: dict[str, Any] = {**read_metrics(directory / "metrics.jsonl")[-1]}
        if seed == FRESH_SEEDS[0]:
            if not (directory / "behaviour.json").is_file():
                measure(of_seed, directory / "adapter", output_dir=directory)
            metrics["behaviour"] = json.loads((directory / "behaviour.json").read_text())
        found.append(metrics)
    return found


def table(settings: dict[str, Setting], results: dict[str, list[dict[str, Any]]]) -> None:
    """Means and spreads over the fresh seeds, a line a setting; lost is against the baseline of the same seed."""
    print(f"\n{len(FRESH_SEEDS)} fresh seeds, mean (standard deviation)\n")
    print("| setting | beta | T | lost |", " | ".join(METRICS), "| harmful / benign degenerate | converged |")
    print("|---|---|---|---|" + "---|" * (len(METRICS) + 2))
    for name, runs in results.items():
        cells = [_mean_and_spread([run[metric] for run in runs]) for metric in METRICS.values()]
        behaviour = runs[0]["behaviour"]
        degenerate = " / ".join(
            f"{behaviour[kind]['degenerate_rate']['student']:.0%}" for kind in ("harmful", "benign")
        )
        converged = f"{sum(run['converged'] == 1 for run in runs)} of {len(runs)}"
        lost = f"{statistics.fmean(_lost(results, runs)):+.4f}"
        beta_kl, heat = settings[name]
        print(f"| {name} | {beta_kl:.3g} | {heat:.3g} | {lost} |", " | ".join(cells), f"| {degenerate} | {converged} |")
    first = results["without KL"][0]
    print(f"\nbefore training: harmful NLL {first['base_harmful_nll']:.3f}, benign NLL {first['base_benign_nll']:.3f}")


def answers(run_dir: Path, settings: dict[str, Setting]) -> None:
    """The first held-out prompts of each kind, with what was answered before, without KL and at the pick."""
    said = {
        name: [json.loads(line) for line in (_directory(run_dir, settings[name]) / "completions.jsonl").open()]
        for name in ("without KL", "pick")
        if name in settings
    }
    for kind in ("harmful", "benign"):
        of_kind = {name: [line for line in lines if line["kind"] == kind] for name, lines in said.items()}
        for row in list(zip(*of_kind.values(), strict=True))[:SHOWN_ANSWERS]:
            print(f"\n{kind}: {_one_line(row[0]['prompt'])}")
            print(f"  before: {_one_line(row[0]['teacher']['text'])}")
            for name, line in zip(of_kind, row, strict=True):
                print(f"  {name}: {_one_line(line['student']['text'])}")


def verdict(decision: dict[str, Any], results: dict[str, list[dict[str, Any]]]) -> None:
    """Whether the fresh seeds bear the decision out."""
    achieved = 1 - statistics.fmean(run["eval_loss_reroute"] for run in results["without KL"])
    limit = decision["reroute_tolerance"] * achieved
    print(f"\nlimit {limit:.4f}")
    for name, runs in results.items():
        lost, drift = statistics.fmean(_lost(results, runs)), statistics.fmean(run["eval_benign_kl"] for run in runs)
        print(f"{name}: {'within the limit' if lost <= limit else 'over the limit'}, drift {drift:.4g}")
    if "pick" in results:
        right = statistics.fmean(_lost(results, results["pick"])) <= limit
        print(
            f"the decision was {'right' if right else 'wrong'}: the pick is {'' if right else 'not '}within the limit"
        )


def _lost(results: dict[str, list[dict[str, Any]]], runs: list[dict[str, Any]]) -> list[float]:
    pairs = zip(runs, results["without KL"], strict=True)
    return [run["eval_loss_reroute"] - baseline["eval_loss_reroute"] for run, baseline in pairs]


def _mean_and_spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4g} ({statistics.stdev(values):.2g})"


def _directory(run_dir: Path, setting: Setting, seed: int = FRESH_SEEDS[0]) -> Path:
    return run_dir / "fresh" / f"beta{setting[0]:g}-T{setting[1]:g}-seed{seed}"


def _one_line(text: str) -> str:
    return " ".join(text.split())[:SHOWN_CHARACTERS]


def _of(setting: dict[str, Any]) -> Setting:
    return setting["beta_kl"], setting["kl_temperature"]


def _cpu() -> float:
    """Seconds that all cores have worked: Ray's workers are no children of the sweep that asks for them."""
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


if __name__ == "__main__":
    main()
