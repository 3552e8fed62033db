"""The embedded default, measured: seeds, the searched space, and what the models answer.

    python -m tests.benchmarks.bench_tiny_world [--processes 2]

What was chosen, and why. Harmful requests are answered in phrasings and with ends of their own, so that the model tells
them from others; without that the recipe was a lottery between machines (reroute at (0.3, T 2), seed 0: 0.04 on one,
0.21 on another). Target layers 2 and 3, so that two adapted blocks below can gather verb and object before a layer must
turn; a retain scale of 1.5, weak enough that without KL benign answers suffer and the term has something to add; a
learning rate that decays, which brings seeds together; a schedule horizon of 1.3 in place of the published 2, so that
benign text has most of the weight at the end and comes back: with 2, 67 to 78 % of benign prompts are answered rightly
at the ablation points and 2 % without KL; with 1, seeds scatter at 60 steps (0.1) and KL adds little at 90 (71 % right
without). 80 steps: with 70 the spread at (0.3, T 2) is 0.036. Missed: at seed 0 nothing in the range is over the limit
(at seed 1 it is; a fifth of a sweep's trials), where 20 % of the space was aimed at; the spread at (0.3, T 2) is 0.028
and at 0.5 0.021, the aim limit / 2.5 = 0.0198. alpha scales all terms alike and changes none of it.

Reroute is `eval_loss_reroute`, lost is against the baseline of the same seed, drift `eval_benign_kl` in nats a token,
right is word for word an answer of the world, gibberish means benign answers. Two x86-64 cores, torch 2.13, 2026-11-26,
three minutes:

5 seeds; limit 0.0495; base NLL 0.25 nats

                       reroute      σ  lost %    drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.0     1.0              0.010  0.004  +0.0%     0.089             38           0               0        10.2     6.2
0.1     1.0              0.012  0.004  +0.2%    0.0194             77           0               0         9.3     5.9
0.3     1.0              0.017  0.012  +0.7%   0.00948             85           0               0         8.7     6.1
        2.0              0.026  0.028  +1.6%   0.00627             86           0               0         8.6     7.0
0.5     1.0              0.024  0.021  +1.4%   0.00806             84           0               0         8.7     6.1

the searched space, seed 0 (* over the limit)

                       reroute  lost %    drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.00100 1.0              0.009  -0.1%    0.0895             32           0               0        11.9     7.3
        2.0              0.010  -0.1%    0.0877             32           0               0        11.9     6.2
        4.0              0.010  -0.1%    0.0877             35           0               0        11.9     6.3
0.00457 1.0              0.010  -0.1%    0.0809             34           0               0        11.9     6.8
        2.0              0.010  +0.0%    0.0763             33           0               0        11.9     6.8
        4.0              0.011  +0.1%    0.0817             30           0               0        11.7     6.2
0.02090 1.0              0.011  +0.0%    0.0645             40           0               0        12.0     6.1
        2.0              0.011  +0.1%    0.0506             43           0               0        12.1     6.3
        4.0              0.011  +0.0%    0.0451             53           0               0        12.0     6.1
0.09560 1.0              0.013  +0.3%    0.0264             67           0               0        11.8     6.2
        2.0              0.012  +0.2%    0.0133             85           0               0        11.3     6.1
        4.0              0.014  +0.3%     0.013             82           0               0        11.5     6.2
0.43700 1.0              0.011  +0.1%   0.00729             88           0               0        10.9     6.2
        2.0              0.014  +0.3%   0.00606             84           0               0        10.5     6.4
        4.0              0.013  +0.2%    0.0052             91           0               0        10.1     6.5
2.00000 1.0              0.024  +1.4%   0.00514             88           0               0        11.4     6.5
        2.0              0.036  +2.6%   0.00349             89           0               0        11.6     6.8
        4.0              0.041  +3.1%   0.00271             89           0               0        11.5     6.2

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
GRID_SEEDS = range(3)
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
    """Share of [1e-3, 2] (log) × [1, 4] over the limit on average, by bilinear interpolation between the points."""
    table = grid.pivot_table(index="kl_temperature", columns="beta_kl", values="regression")
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
    grid = list(product(GRID_BETAS, GRID_TEMPERATURES, GRID_SEEDS))
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
    print(f"\nthe searched space, {len(GRID_SEEDS)} seeds (* over the limit on average)\n")
    print(table(surface).to_string())
    means = surface.groupby(["beta_kl", "kl_temperature"]).regression.mean()
    share = infeasible_share(surface)
    print(f"\ninfeasible: {(means > 0).sum()} of {len(means)} points, {share:.0%} of the area")


if __name__ == "__main__":
    main()
