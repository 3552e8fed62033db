"""The embedded default, measured: seeds, the searched space, and what the models answer.

    python -m tests.benchmarks.bench_tiny_world [--processes 2]

What was chosen, and why. Harmful requests are answered in phrasings and with ends of their own, so that the model tells
them from others; without that the recipe was a lottery between machines (reroute at (0.3, T 2), seed 0: 0.04 on one,
0.21 on another). Target layers 2 and 3, so that two adapted blocks below can gather verb and object before a layer must
turn; a retain scale of 1.5, weak enough that without KL benign answers suffer and the term has something to add; a
learning rate that decays, which brings seeds together; 70 steps: with 85, benign answers survive without KL (39 %),
with 60, 67 % are right at the pick. Missed: at seed 0 nothing in the range is over the limit (at seed 1 weights from
1.6 on are), where 20 % of the space was aimed at; over seeds 67 to 78 % of benign prompts are answered rightly at the
ablation points, and 85 % only from weights around 2 on; the spread at (0.3, T 2) is 0.0200, the aim limit / 2.5 =
0.0199. An alpha of 3 or 1.5 changes none of it.

Reroute is `eval_loss_reroute`, lost is against the baseline of the same seed, drift `eval_benign_kl` in nats a token,
right is word for word an answer of the world, gibberish means benign answers. Two x86-64 cores, torch 2.13, 2026-11-26,
three minutes:

5 seeds; limit 0.0497; base NLL 0.25 nats

                       reroute      σ  lost %   drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.0     1.0              0.007  0.003  +0.0%     0.68              2           4               0         9.9     6.4
0.1     1.0              0.012  0.004  +0.6%    0.199             25           0               0        10.1     5.7
0.3     1.0              0.019  0.010  +1.3%   0.0413             67           0               0         9.1     6.1
        2.0              0.023  0.020  +1.6%   0.0185             78           0               0         8.7     8.7
0.5     1.0              0.024  0.018  +1.8%   0.0267             73           0               0         8.8     6.7

the searched space, seed 0 (* over the limit)

                       reroute  lost %    drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.00100 1.0              0.011  -0.0%     0.534              8          17               0        10.5     6.8
        2.0              0.011  -0.0%     0.522              8          15               0        10.5     7.7
        4.0              0.011  +0.0%     0.529              8          14               0        10.5     7.9
0.00457 1.0              0.011  +0.0%     0.486              8           9               0        10.6     8.4
        2.0              0.011  +0.0%     0.427              6          11               0        10.9     7.0
        4.0              0.011  +0.0%     0.464              6           9               0        10.7     8.0
0.02090 1.0              0.011  +0.0%     0.329              9           4               0        10.9     8.2
        2.0              0.014  +0.3%     0.259             10           3               0        11.4     7.1
        4.0              0.013  +0.2%      0.24             10           1               0        11.5     6.6
0.09560 1.0              0.016  +0.5%     0.162             24           0               0        11.8     7.3
        2.0              0.016  +0.5%    0.0906             31           0               0        12.2     6.1
        4.0              0.015  +0.5%    0.0933             26           0               0        12.1     6.5
0.43700 1.0              0.014  +0.3%    0.0297             72           0               0        11.0     6.2
        2.0              0.014  +0.4%    0.0189             84           0               0        10.9     6.2
        4.0              0.013  +0.3%    0.0161             83           0               0        11.1     6.2
2.00000 1.0              0.024  +1.3%    0.0134             81           0               0        11.5     6.5
        2.0              0.031  +2.0%   0.00856             90           0               0        11.1     6.1
        4.0              0.032  +2.2%   0.00676             86           0               0        11.3     6.3

infeasible: 0 of 18 points, 0% of the area
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
            "gibberish %": (100 * means.benign_gibberish).map("{:.0f}".format),
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
