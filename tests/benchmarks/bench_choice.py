"""Are the settings that sweeps of the embedded default recommend truly feasible?

    python -m tests.benchmarks.bench_choice [--sweep-seeds 0 100 200] [--processes 2]

Runs `python sweeps/kl_ablation.py --num-samples 20` for each sweep seed as a user would, then trains every
recommended setting, and the baseline, on five fresh seeds: the truth that the sweep did not see. A setting is truly
feasible where its mean rerouting loss over those seeds is within the limit of the baselines'.

Two shared x86-64 cores, 2026-11-23, limit 0.0494, all `choose`:

    sweep seed  beta_kl    T     P  confirmed  drift kept  lost on fresh seeds  truly feasible
             0     0.5     1  0.99        yes       0.048        0.034 ± 0.003             yes
           100     0.5     1  1.00        yes       0.054        0.034 ± 0.003             yes
           200     0.593   1  0.97         no       0.051        0.042 ± 0.003             yes
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.constraint import absolute_tolerance
from tests.benchmarks.bench_tiny_world import TOLERANCE, measure

ROOT = Path(__file__).resolve().parents[2]
FRESH_SEEDS = range(1000, 1005)


def recommendation(seed: int, folder: Path) -> dict[str, Any]:
    """`decision.json` of a sweep and its report, both by the commands."""
    run = folder / f"seed-{seed}"
    sweep = ["sweeps/kl_ablation.py", "--num-samples", "20", "--seed", str(seed), "--run-dir", str(run)]
    for command in (sweep, ["analysis/pick_beta.py", str(run)]):
        subprocess.run([sys.executable, *command], cwd=ROOT, check=False, stdout=subprocess.DEVNULL)
    return json.loads((run / "report" / "decision.json").read_text())


def main() -> None:
    """Sweep, train anew, and print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sweep-seeds", type=int, nargs="+", default=[0, 100, 200])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        decisions = {seed: recommendation(seed, Path(folder)) for seed in options.sweep_seeds}
    chosen = {seed: (made["beta_kl"], made["kl_temperature"]) for seed, made in decisions.items() if made["beta_kl"]}
    settings = [(0.0, 1.0), *dict.fromkeys(chosen.values())]
    points = [(*setting, seed) for setting in settings for seed in FRESH_SEEDS]
    with ProcessPoolExecutor(options.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = pd.DataFrame(pool.map(measure, points))
    losses = results.groupby(["beta_kl", "kl_temperature"])["eval_loss_reroute"]
    baseline = losses.get_group((0.0, 1.0))
    tolerance = absolute_tolerance(baseline, TOLERANCE)
    rows = []
    for seed, made in decisions.items():
        row = {name: made[name] for name in ("verdict", "confirmed", "beta_kl", "kl_temperature")}
        row |= {"P": made["probability_feasible"], "drift kept": made["drift_kept"]}
        if seed in chosen:
            fresh = losses.get_group(chosen[seed])
            lost = fresh.mean() - baseline.mean()
            error = np.sqrt(fresh.var(ddof=1) / len(fresh) + baseline.var(ddof=1) / len(baseline))
            row |= {"lost": lost, "± SE": error, "truly feasible": lost <= tolerance}
        rows.append({"sweep seed": seed, **row})
    print(f"limit {tolerance:.4f}, on {len(FRESH_SEEDS)} fresh seeds; baseline reroute {baseline.mean():.4f}\n")
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.4f"))


if __name__ == "__main__":
    main()
