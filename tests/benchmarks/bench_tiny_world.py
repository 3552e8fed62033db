"""The embedded default, measured: seeds, the searched space, and what the models answer.

    python -m tests.benchmarks.bench_tiny_world [--processes 2]

What was chosen, and why. Target layers 2 and 3, so that two adapted blocks below can gather verb and object before a
layer must turn; a retain scale of 1.5, weak enough that without KL benign answers suffer and the term has something to
add; learning rate and steps so that a trial takes some four seconds. The world and the model were left as they were.
Three aims are missed: the spread between seeds at beta_kl 0.1 and 0.3 is 0.035 and 0.027, above limit / 2.5 = 0.019;
over five seeds at T = 1 to 2 some 70 to 78 % of benign prompts are answered rightly, above 85 % only at points such as
(0.44, T 1 and 2) of seed 0; without KL none are. Reroute is `eval_loss_reroute`, lost is against the baseline of the
same seed, drift `eval_benign_kl` in nats a token, right is word for word an answer of the world. Two shared x86-64
cores, torch 2.13, 2026-11-26, two minutes:

5 seeds; limit 0.0482; base NLL 0.08 nats

                       reroute      σ  lost %   drift benign right % benign gibberish % harmful right % harmful NLL tr
beta_kl kl_temperature
0.0     1.0              0.035  0.015  +0.0%     6.71              0                100               0         9.3
0.1     1.0              0.079  0.035  +4.4%     1.32              0                 74               0         4.7
0.3     1.0              0.028  0.027  -0.8%   0.0646             69                  0               0         8.3
        2.0              0.036  0.020  -0.0%   0.0136             70                  1               0         8.6
0.5     1.0              0.033  0.009  -0.2%   0.0274             78                  2               0         8.3

the searched space, seed 0 (* over the limit)

                       reroute   lost %    drift benign right % benign gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.00100 1.0              0.021   -1.4%      5.36              0                100               0         7.8     3.9
        2.0              0.018   -1.8%      4.94              0                100               0         8.7     4.2
        4.0              0.011   -2.5%      5.51              0                100               0         8.8     3.9
0.00457 1.0              0.019   -1.7%      4.48              0                100               0         7.6     4.1
        2.0              0.011   -2.6%      4.64              0                100               0         6.5     4.1
        4.0              0.012   -2.5%      3.96              0                100               0         7.1     3.9
0.02090 1.0              0.020   -1.6%      2.53              0                 98               0         4.2     4.0
        2.0              0.082   +4.8%      2.22              0                 98               0         5.2     4.5
        4.0              0.047   +1.2%      2.53              0                 96               0         5.1     4.4
0.09560 1.0              0.136  +10.5%*     1.08              0                 57               0         3.8     4.1
        2.0              0.052   +1.8%      0.28             26                  0               0         5.9     4.1
        4.0              0.023   -1.2%      0.53              4                  1               0         6.5     4.2
0.43700 1.0              0.027   -0.8%    0.0428             90                  0               0         6.8     4.1
        2.0              0.066   +3.2%    0.0121             97                  0               0         8.0     4.1
        4.0              0.090   +5.7%*    0.022             81                  0               0         7.0     4.2
2.00000 1.0              0.199  +17.0%*   0.0227             14                  0               0         6.0     4.1
        2.0              0.355  +33.2%*  0.00431              3                  0               0         4.4     4.2
        4.0              0.462  +44.2%*   0.0104              7                  0               0         3.6     3.7

infeasible: 5 of 18 points, 22% of the area
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis.constraint import absolute_tolerance, reroute_regression

if TYPE_CHECKING:
    from cbtrain.config import CircuitBreakerConfig

SEEDS = range(5)
SETTINGS = ((0.0, 1.0), (0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 2.0))
GRID_BETAS = tuple(float(f"{beta:.3g}") for beta in np.geomspace(1e-3, 2, 6))
GRID_TEMPERATURES = (1.0, 2.0, 4.0)
TOLERANCE = 0.05


def measure(point: tuple[float, float, int], *, answers: bool = False) -> dict[str, float]:
    """Train one setting on one thread; its held-out metrics, and with `answers` what it says to held-out prompts."""
    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    import torch

    from cbtrain.config import get_config
    from cbtrain.model import loading
    from cbtrain.training import loop

    torch.set_num_threads(1)
    beta_kl, kl_temperature, seed = point
    config = replace(loading.resolve(get_config("tiny")), beta_kl=beta_kl, kl_temperature=kl_temperature, seed=seed)
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        metrics = loop.train(config, Path(directory), lambda _metrics: None)
        wall_s = time.perf_counter() - started
        said = what_it_says(config, Path(directory)) if answers else {}
    return {"beta_kl": beta_kl, "kl_temperature": kl_temperature, "seed": seed} | metrics | said | {"wall_s": wall_s}


def what_it_says(config: "CircuitBreakerConfig", directory: Path) -> dict[str, float]:
    """Shares of held-out prompts, at most 96 of a kind, that a trained run answers rightly, and with gibberish."""
    from cbtrain.evaluation import behaviour
    from cbtrain.model.tiny import answers_rightly

    behaviour.measure(config, directory / "adapter", prompts=96, max_new_tokens=24, output_dir=directory)
    lines = [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]
    shares = {}
    for kind in ("benign", "harmful"):
        asked = [line for line in lines if line["kind"] == kind]
        right = [answers_rightly(line["prompt"], line["student"]["text"]) for line in asked]
        shares[f"{kind}_right"] = float(np.mean(right))
        shares[f"{kind}_gibberish"] = float(np.mean([line["student"]["gibberish"] for line in asked]))
    return shares


def infeasible_share(grid: pd.DataFrame) -> float:
    """Share of [1e-3, 2] (log) × [1, 4] over the limit, by bilinear interpolation between the grid's points."""
    table = grid.pivot(index="kl_temperature", columns="beta_kl", values="regression")
    log_betas, temperatures = np.log(table.columns.to_numpy()), table.index.to_numpy()
    fine_log_betas, fine_temperatures = np.linspace(*log_betas[[0, -1]], 400), np.linspace(1, 4, 200)
    by_beta = np.array([np.interp(fine_log_betas, log_betas, row) for row in table.to_numpy()])
    surface = np.array([np.interp(fine_temperatures, temperatures, column) for column in by_beta.T])
    return float((surface > 0).mean())


def table(results: pd.DataFrame) -> pd.DataFrame:
    """A row a setting, mean over its seeds; shares of prompts in %."""
    settings = results.groupby(["beta_kl", "kl_temperature"])
    means = settings.mean()
    return pd.DataFrame(
        {
            "reroute": means.eval_loss_reroute.map("{:.3f}".format),
            "σ": settings.eval_loss_reroute.std().map("{:.3f}".format),
            "lost %": means.lost.map("{:+.1%}".format) + np.where(means.regression > 0, "*", " "),
            "drift": means.eval_benign_kl.map("{:.3g}".format),
            "benign right %": (100 * means.benign_right).map("{:.0f}".format),
            "benign gibberish %": (100 * means.benign_gibberish).map("{:.0f}".format),
            "harmful right %": (100 * means.harmful_right).map("{:.0f}".format),
            "harmful NLL": means.eval_harmful_nll.map("{:.1f}".format),
            "train s": means.wall_s.map("{:.1f}".format),
        }
    )


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    processes = parser.parse_args().processes
    replicated = [(beta, temperature, seed) for (beta, temperature), seed in product(SETTINGS, SEEDS)]
    grid = [(beta, temperature, 0) for beta, temperature in product(GRID_BETAS, GRID_TEMPERATURES)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        results = pd.DataFrame(pool.map(partial(measure, answers=True), [*replicated, *grid]))

    baseline_rows = results[results.beta_kl == 0]
    baseline = dict(zip(baseline_rows.seed, baseline_rows.eval_loss_reroute, strict=True))
    tolerance = absolute_tolerance(baseline.values(), TOLERANCE)
    results["regression"] = [
        reroute_regression(loss, seed, baseline, tolerance)
        for loss, seed in zip(results.eval_loss_reroute, results.seed, strict=True)
    ]
    achieved = 1 - results.seed.map(baseline)
    results["lost"] = (results.eval_loss_reroute - 1 + achieved) / achieved
    print(f"{len(SEEDS)} seeds; limit {tolerance:.4f}; base NLL {results.base_harmful_nll[0]:.2f} nats\n")
    print(table(results.iloc[: len(replicated)]).to_string())
    surface = results.iloc[len(replicated) :]
    print("\nthe searched space, seed 0 (* over the limit)\n")
    print(table(surface).drop(columns="σ").to_string())
    over = int((surface.regression > 0).sum())
    print(f"\ninfeasible: {over} of {len(surface)} points, {infeasible_share(surface):.0%} of the area")


if __name__ == "__main__":
    main()
