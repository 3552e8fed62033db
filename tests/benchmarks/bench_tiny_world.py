"""How noisy the embedded default is, and how much of the searched space its constraint forbids.

    python -m tests.benchmarks.bench_tiny_world [--processes 2]

Measured on two cores of a shared x86-64 machine (torch 2.13, CPU), 2026-11-22; tolerance 0.0493, base NLL 0.08:

    5 seeds            reroute   σ       σ paired   drift    σ       benign NLL   harmful NLL
    beta_kl 0          0.0131  0.0029     0         6.62   0.23        6.74          7.69
    beta_kl 0.1, T 1   0.0152  0.0030   0.0021      1.03   0.10        1.13          2.00
    beta_kl 0.3, T 1   0.0325  0.0059   0.0056      0.586  0.16        0.69          1.69
    beta_kl 0.3, T 2   0.0792  0.0121   0.0098      0.294  0.12        0.39          1.60

    seed 0: reroute (* over the limit) and drift
    beta_kl       T 1            T 2            T 4
    0.001     0.012  2.18    0.012  2.45    0.012  3.35
    0.00457   0.012  1.99    0.012  1.98    0.011  2.83
    0.0209    0.010  1.42    0.012  1.34    0.011  1.86
    0.0956    0.014  0.88    0.037  0.595   0.025  0.951
    0.437     0.044  0.324   0.091* 0.15    0.098* 0.202
    2         0.124* 0.0593  0.231* 0.0122  0.293* 0.00874
    infeasible: 5 of 18 points (28 %), 28 % of the area

Reroute is `eval_loss_reroute`, drift `eval_benign_kl` in nats per scored token, NLL in nats per scored prediction.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.constraint import absolute_tolerance, reroute_regression

SEEDS = range(5)
SETTINGS = ((0.0, 1.0), (0.1, 1.0), (0.3, 1.0), (0.3, 2.0))
GRID_BETAS = tuple(float(f"{beta:.3g}") for beta in np.geomspace(1e-3, 2, 6))
GRID_TEMPERATURES = (1.0, 2.0, 4.0)
TOLERANCE = 0.05


def measure(point: tuple[float, float, int]) -> dict[str, float]:
    """Train one setting on one thread; its held-out metrics."""
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
    return (
        {"beta_kl": beta_kl, "kl_temperature": kl_temperature, "seed": seed}
        | metrics
        | {"wall_s": time.perf_counter() - started}
    )


def infeasible_share(grid: pd.DataFrame) -> float:
    """Share of [1e-3, 2] (log) × [1, 4] over the limit, by bilinear interpolation between the grid's points."""
    table = grid.pivot(index="kl_temperature", columns="beta_kl", values="regression")
    log_betas, temperatures = np.log(table.columns.to_numpy()), table.index.to_numpy()
    fine_log_betas, fine_temperatures = np.linspace(*log_betas[[0, -1]], 400), np.linspace(1, 4, 200)
    by_beta = np.array([np.interp(fine_log_betas, log_betas, row) for row in table.to_numpy()])
    surface = np.array([np.interp(fine_temperatures, temperatures, column) for column in by_beta.T])
    return float((surface > 0).mean())


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    processes = parser.parse_args().processes
    replicated = [(beta, temperature, seed) for (beta, temperature), seed in product(SETTINGS, SEEDS)]
    grid = [(beta, temperature, 0) for beta, temperature in product(GRID_BETAS, GRID_TEMPERATURES)]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=spawn) as pool:
        results = pd.DataFrame(pool.map(measure, [*replicated, *grid]))

    baseline_rows = results[results.beta_kl == 0]
    baseline = dict(zip(baseline_rows.seed, baseline_rows.eval_loss_reroute, strict=True))
    tolerance = absolute_tolerance(baseline.values(), TOLERANCE)
    results["regression"] = [
        reroute_regression(loss, seed, baseline, tolerance)
        for loss, seed in zip(results.eval_loss_reroute, results.seed, strict=True)
    ]
    seeds = results.iloc[: len(replicated)].groupby(["beta_kl", "kl_temperature"])
    noise = pd.DataFrame(
        {
            "reroute": seeds.eval_loss_reroute.mean(),
            "σ reroute": seeds.eval_loss_reroute.std(),
            "σ paired": seeds.regression.std(),
            "drift": seeds.eval_benign_kl.mean(),
            "σ drift": seeds.eval_benign_kl.std(),
            "benign NLL": seeds.eval_benign_nll.mean(),
            "harmful NLL": seeds.eval_harmful_nll.mean(),
            "wall s": seeds.wall_s.mean(),
        }
    )
    print(f"{len(SEEDS)} seeds; tolerance {tolerance:.4f}; base NLL {results.base_harmful_nll[0]:.2f} nats\n")
    print(noise.to_string(float_format="%.4f"))
    surface = results.iloc[len(replicated) :]
    shown = surface.assign(
        cell=[
            f"{loss:.3f}{'*' if over > 0 else ' '} {drift:.3g}"
            for loss, over, drift in zip(
                surface.eval_loss_reroute, surface.regression, surface.eval_benign_kl, strict=True
            )
        ]
    )
    print("\nreroute (* over the limit) and drift, seed 0\n")
    print(shown.pivot(index="beta_kl", columns="kl_temperature", values="cell").to_string())
    over = int((surface.regression > 0).sum())
    print(f"\ninfeasible: {over} of {len(surface)} points, {infeasible_share(surface):.0%} of the area")


if __name__ == "__main__":
    main()
