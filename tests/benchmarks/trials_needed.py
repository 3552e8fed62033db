"""How many trials do the methods of `bench_search` need for the loss that ours has at twenty?

    python -m tests.benchmarks.trials_needed [--runs 60] [--noises 0.01 0.02] [--failing trials --rate 0.05]

Each peer is simulated on the same drawn surfaces with 20 to 320 trials in all, as many of them baselines as ours would
run. It takes the observed feasible trial of least drift, which is the more often one that noise alone made feasible the
more trials there are; so each is tried with a margin too, by which a trial must keep the limit: two standard deviations
of its baselines' reroute loss. What it needs is the least number of trials at which its mean loss is not above ours;
between two of them the logarithm of the number is interpolated.

Mean loss without a margin, noise 1 %, none failing, 60 sweeps a cell (95 % interval), 2026-11-27; ours at 20 trials has
0.053 [0.036, 0.073], with none of its recommendations infeasible. The peers' loss grows with their trials, and at 320
45 to 88 % of their recommendations are infeasible, at 20 7 to 10 %:

                          20     40     80    160                   320
    random             0.248  0.337  0.431  0.531  0.669 [0.546, 0.780]
    grid               0.248  0.296  0.491  0.712  0.852 [0.760, 0.932]
    Sobol              0.203  0.229  0.391  0.452  0.552 [0.426, 0.676]
    TPE                0.257  0.349  0.455  0.518  0.505 [0.392, 0.618]
    constrained TPE    0.241  0.278  0.514  0.719  0.883 [0.800, 0.950]
    NSGA-II            0.289  0.357  0.491  0.573  0.715 [0.601, 0.821]
"""

import argparse
import itertools
import math
import os
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any, get_args

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import optuna
import pandas as pd

from tests.benchmarks.bench_search import CORRELATIONS, interval
from tests.benchmarks.search_methods import NUM_SAMPLES, PEERS, Job, simulate
from tests.benchmarks.surfaces import Failing

TRIALS = (20, 40, 80, 160, 320)
MARGINS = {"": 0.0, ", margin": 2.0}
OURS, STOCK, STOCK_WITH_MARGIN, BEST = "plan", "TPE", "TPE, margin", "best peer"
"""`STOCK` is what OptunaSearch does unasked; `BEST` is the peer that turns out to lose least, at each number."""


def losses(
    runs: int, noises: list[float], failing: tuple[Failing, float] = ("none", 0.0), processes: int | None = None
) -> pd.DataFrame:
    """A row a simulated sweep: `noise`, `method`, `num_samples`, `loss`, and what else `simulate` tells."""
    jobs = [job for noise in noises for run in range(runs) for job in _of_run(run, noise, failing)]
    with ProcessPoolExecutor(processes, initializer=_quiet) as pool:
        return pd.DataFrame(pool.map(_simulated, jobs, chunksize=10))


def _of_run(run: int, noise: float, failing: tuple[Failing, float]) -> list[Job]:
    """Ours at `NUM_SAMPLES` and every peer at every number of trials, on one surface."""
    ours = Job(OURS, noise, CORRELATIONS[run % len(CORRELATIONS)], run, 0, "softplus", "reachable", *failing)
    peers = itertools.product(PEERS, TRIALS, MARGINS.values())
    return [ours, *(replace(ours, method=name, num_samples=number, margin=each) for name, number, each in peers)]


def _simulated(job: Job) -> dict[str, Any]:
    (name,) = (name for name, margin in MARGINS.items() if margin == job.margin)
    return simulate(job) | {"method": job.method + name}


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)


def needed(found: pd.DataFrame, noise: float) -> dict[str, float]:
    """By peer, the trials for our mean loss at this noise; infinite where `TRIALS` ends before."""
    of_noise = found[found["noise"] == noise]
    ours = float(of_noise.loc[of_noise["method"] == OURS, "loss"].mean())
    table = of_noise[of_noise["method"] != OURS].pivot_table(index="num_samples", columns="method", values="loss")
    curves = {name: table[name] for name in (STOCK, STOCK_WITH_MARGIN)} | {BEST: table.min(axis=1)}
    return {name: _crossing(curve, ours) for name, curve in curves.items()}


def _crossing(curve: "pd.Series[float]", level: float) -> float:
    """The number of trials, logarithmically interpolated, from which on a curve first is not above a level."""
    points = [(math.log(number), loss) for number, loss in curve.sort_index().items()]
    if points[0][1] <= level:
        return math.exp(points[0][0])
    for (before, above), (after, below) in itertools.pairwise(points):
        if below <= level:
            return math.exp(before + (above - level) / (above - below) * (after - before))
    return math.inf


def told(number: float) -> str:
    return f"{number:.0f}" if math.isfinite(number) else f"more than {TRIALS[-1]}"


def table(found: pd.DataFrame) -> pd.DataFrame:
    """A row a noise and method: the loss at each number of trials, with its 95 % interval at the first and last."""
    rows = []
    for (noise, method), sweeps in found.groupby(["noise", "method"], sort=False):
        by_number = {number: of_number["loss"] for number, of_number in sweeps.groupby("num_samples")}
        cells = {
            str(number): (interval(loss) if number in (TRIALS[0], TRIALS[-1]) else f"{loss.mean():.3f}")
            for number, loss in by_number.items()
        }
        rows.append({"noise": f"{noise:.0%}", "method": method, **cells})
    return pd.DataFrame(rows).fillna("")


def main() -> None:
    """Simulate and print the losses, and what each needs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=60, help="sweeps a cell (noise × method × number of trials)")
    parser.add_argument("--noises", nargs="+", type=float, default=[0.01, 0.02])
    parser.add_argument("--failing", choices=get_args(Failing), default="none")
    parser.add_argument("--rate", type=float, default=0.0, help="of runs that fail")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    found = losses(options.runs, options.noises, (options.failing, options.rate), options.processes)
    print(f"{options.runs} sweeps a cell, failing: {options.failing} {options.rate:.0%}; mean loss by trials\n")
    print(table(found).to_string(index=False))
    for noise in options.noises:
        said = ", ".join(f"{name} {told(number)}" for name, number in needed(found, noise).items())
        print(f"noise {noise:.0%}: for the loss of {OURS} at {NUM_SAMPLES} trials: {said}")


if __name__ == "__main__":
    main()
