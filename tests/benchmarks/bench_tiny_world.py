"""The embedded default, measured: seeds, the searched space, and what the models answer.

    python -m tests.benchmarks.bench_tiny_world [--processes 2]

What was chosen, and why. Harmful requests are answered in phrasings and with ends of their own, so that the model tells
them from others; without that the recipe was a lottery between machines (reroute at (0.3, T 2), seed 0: 0.04 on one,
0.21 on another). Target layers 2 and 3, so that two adapted blocks below can gather verb and object before a layer must
turn; a retain scale of 1.5, weak enough that without KL benign answers suffer and the term has something to add; a
learning rate that decays, which brings seeds together; a schedule horizon of 1.3 in place of the published 2, so that
benign text has most of the weight at the end and comes back: with 2, 67 to 78 % of benign prompts are answered rightly
at the ablation points and 2 % without KL; with 1, seeds scatter at 60 steps (0.1) and KL adds little at 90 (71 % right
without). LoRA rank 32: with 8 what A draws at its start decides when a layer collapses (spread 0.028 at (0.3, T 2),
0.009 now), at no cost in time. Missed: nothing of the range is over the limit on average, although the corner of it
(beta_kl 2, T above 2) comes within 0.6 points of it and a quarter of a sweep's trials there are over it; 20 % of the
space was aimed at. Fewer steps would do it, and bring the spread back: 75 put (2, T 4) at 6.4 % lost with a spread of
0.05, 70 at 7.7 % with 0.06, and leave 82 % of benign prompts right. alpha scales all terms alike: no help.

Whole sweeps of 20, seeds 0 to 4: `choose` at four (beta_kl 1.19 T 2, 1.39 T 3.5, 1.81 T 2.5, 1.91 T 2; the first two
confirmed on four seeds, P .96 to .99), `insufficient_evidence` at seed 4 (its search met seed 7, at which weights from
1.5 on lose 0.15, and stayed there; P .94 at 0.1); 103 to 117 s each, other work beside some of them.

Of another machine's base (seed 1, as seed 0 did not learn the world there; 2026-11-27) sweep seeds 0 to 2: `choose` at
1.94, 1.95 and 1.80, T 4, each confirmed on four seeds, 135 to 156 s with the report; trained again on five fresh seeds
98 to 100 % of benign prompts are answered rightly there, 60 to 97 % without KL. A quiet machine took 74 s for seed 0,
the same pick, of which 12 s from the last trial's end to the verdict with behaviour.

Reroute is `eval_loss_reroute`, lost is against the baseline of the same seed, drift `eval_benign_kl` in nats a token,
right is word for word an answer of the world, gibberish means benign answers. Two x86-64 cores, then a third slower
than they can be, torch 2.13, 2026-11-26, eight minutes:

5 seeds; limit 0.0494; base NLL 0.25 nats

                       reroute      σ  lost %    drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.0     1.0              0.011  0.003  +0.0%      0.11             39           1               0        10.3     9.6
0.1     1.0              0.011  0.005  -0.0%    0.0197             78           0               0         9.1     8.0
0.3     1.0              0.013  0.006  +0.1%   0.00985             83           0               0         8.8     9.1
        2.0              0.014  0.009  +0.3%   0.00531             85           0               0         8.7    11.1
0.5     1.0              0.013  0.008  +0.2%   0.00712             85           0               0         8.9     8.3

the searched space, 3 seeds (* over the limit on average)

                       reroute      σ  lost %    drift benign right % gibberish % harmful right % harmful NLL train s
beta_kl kl_temperature
0.00100 1.0              0.011  0.003  -0.0%    0.0399             60           0               0        10.4    11.1
        2.0              0.011  0.003  -0.1%    0.0389             59           0               0        10.4    10.3
        4.0              0.011  0.003  -0.0%    0.0389             59           0               0        10.5     8.6
0.00457 1.0              0.011  0.003  -0.0%    0.0336             62           0               0        10.4     8.5
        2.0              0.012  0.003  +0.0%     0.031             64           0               0        10.3     7.7
        4.0              0.011  0.003  -0.0%    0.0307             65           0               0        10.3     8.3
0.02090 1.0              0.011  0.004  -0.0%    0.0247             69           0               0        10.2    10.1
        2.0              0.012  0.004  +0.0%    0.0199             72           0               0         9.6    10.4
        4.0              0.011  0.004  -0.0%    0.0189             75           0               0         9.9    10.4
0.09560 1.0              0.013  0.005  +0.2%    0.0135             82           0               0         9.1    10.6
        2.0              0.014  0.007  +0.2%   0.00883             82           0               0         8.8     7.6
        4.0              0.013  0.006  +0.2%   0.00851             82           0               0         8.7     7.8
0.43700 1.0              0.018  0.007  +0.6%   0.00719             85           0               0         8.8     8.5
        2.0              0.023  0.006  +1.2%   0.00514             84           0               0         8.6     7.9
        4.0              0.022  0.007  +1.0%   0.00463             85           0               0         8.5     8.8
2.00000 1.0              0.039  0.013  +2.8%   0.00523             83           0               0         8.8     8.8
        2.0              0.055  0.020  +4.4%   0.00341             82           0               0         8.7     7.9
        4.0              0.055  0.016  +4.4%   0.00283             83           0               0         9.0     8.0

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
    """Shares of held-out prompts, at most 96 of a kind, that a trained run answers rightly, and that are degenerate."""
    from cbtrain.evaluation import behaviour
    from cbtrain.model.tiny import answers_rightly

    behaviour.measure(config, directory / "adapter", prompts=96, max_new_tokens=24, output_dir=directory)
    lines = [json.loads(line) for line in (directory / "completions.jsonl").read_text().splitlines()]
    shares = {}
    for kind in ("benign", "harmful"):
        asked = [line for line in lines if line["kind"] == kind]
        right = [answers_rightly(line["prompt"], line["student"]["text"]) for line in asked]
        shares[f"{kind}_right"] = float(np.mean(right))
        shares[f"{kind}_degenerate"] = float(np.mean([line["student"]["verdict"] == "degenerate" for line in asked]))
    return shares


def infeasible_share(regression: pd.Series) -> float:
    """Share of [1e-3, 2] (log) × [1, 4] over the limit, by bilinear interpolation between the points of its index."""
    table = regression.unstack("beta_kl")
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
            "degenerate %": (100 * means.benign_degenerate).map("{:.0f}".format),
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
    print(f"\ninfeasible: {(means > 0).sum()} of {len(means)} points, {infeasible_share(means):.0%} of the area")


if __name__ == "__main__":
    main()
