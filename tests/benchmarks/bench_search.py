"""Does the search find the right beta_kl in twenty trials, and does it know how sure it is?

    python -m tests.benchmarks.bench_search [--quick] [--runs 510] [--seed 0] [--family softplus] [--processes 2]

Drives `SweepPlan` and `decide` end to end on drawn response surfaces (`surfaces.py`), beside what people use: as many
trials, of which as many baselines, chosen by another method, and the observed feasible trial with the least drift
taken. All methods meet the same surfaces, and a seed's shared error is the same for all of them.

loss        regret of the recommended setting as a share of the reachable gain, (drift − best) / (drift at
            beta_kl 0 − best), best being the least true drift among feasible settings; 1 where the recommendation is
            truly infeasible, or none is made
log loss    the same by the logarithm of drift, which also tells good settings from each other
confirmed   share of the recommendations that ran on two seeds beside their first
infeasible  share of the runs that recommend a setting which truly loses more rerouting than the limit
s a trial   seconds in the plan (or the peer's sampler) a trial

"plan, stopping early" ends the search trials that come out beyond the limit by more than the rule's slack, with a
tenth of their drift as the partial value: it tells what the decision loses by doing without their numbers.

`--failing trials --rate 0.05` lets 5 % of all trials fail as seeds do at which no layer collapses, or one of two:
reroute 0.9 to 1 or 0.4 to 0.6, drift a seventh to a four-hundredth. `drift` fails drift alone, by a factor of 7 to 150
either way; `seed` fails one baseline seed in 1 / rate at every setting.

Two shared x86-64 cores, softplus, seed 0 (mean and 95 % interval), sweeps a cell:

    failing      sweeps  noise                 loss     infeasible %   confirmed %   best peer's loss
    none            210     0%   0.017 [0.014, 0.020]            0.0            99    2026-11-27
    none            210     1%   0.072 [0.058, 0.088]            1.0            78
    none            210     2%   0.138 [0.114, 0.163]            0.5            75
    trials 5 %      210     0%   0.031 [0.017, 0.050]            0.0            90              0.239
    trials 5 %      210     1%   0.091 [0.071, 0.115]            1.0            77              0.287
    trials 5 %      210     2%   0.163 [0.135, 0.194]            1.0            68              0.350
    trials 10 %      60     1%   0.106 [0.061, 0.160]            0.0            67
    drift 5 %        60     1%   0.054 [0.037, 0.073]            0.0            78
    seed 25 %        60     1%   0.069 [0.044, 0.097]            0.0            78
    trials 5 %       60     1%   0.054 [0.031, 0.094]            0.0            85    cliff
    trials 5 %       60     1%   0.102 [0.062, 0.154]            0.0            68    valley

With 5 % failing 98.6, 98.6 and 98.1 % of the sweeps choose; 99.4 % of 620 recommendations are truly feasible, and all
378 surfaces with nothing to recommend are refused. A model without failures (2026-11-23) lost 0.374 there, and 29 % of
its sweeps chose nothing; without failing trials it lost 0.017, 0.066, 0.143 and at a noise of 5 % 0.483 (510 sweeps a
cell, four at a time 0.074 and 0.144 at 1 and 2 %), the best peer 0.159, 0.244, 0.340 and 0.531.

Confirmations beside each other, as here, against one after another, two trials at a time, 5 % failing, 210 sweeps: loss
0.083 against 0.088 at a noise of 1 %, 0.169 against 0.164 at 2 % (each ± 0.02), as many truly feasible and confirmed,
in 11.05 against 12.0 times the length of a trial (2026-11-27). Beside the last trials of the search as well: 10.98, but
0.173 at 2 %, and 51 % confirmed in place of 67.

Sweeps of 100 trials, 6 a cell, seed 7 (2026-11-28): suggestions that rest on 64 trials at most, as here, on 120, or on
all with 64 draws lose 0.030 alike at a noise of 1 %, and 0.072, 0.063 and 0.076 (each ± 0.04) at 3 %; none recommends
an infeasible setting. Seconds a trial in the plan: 0.12, 0.15 and 0.20.
"""

import argparse
import itertools
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import get_args

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import pandas as pd

from tests.benchmarks.search_methods import NUM_SAMPLES, PEERS, PLANS, Job, simulate
from tests.benchmarks.surfaces import Failing, Family, Kind

NOISES = (0.0, 0.01, 0.02, 0.05)
CORRELATIONS = (0.0, 0.5, 0.8)


def interval(values: pd.Series, draws: int = 2000) -> str:
    """Mean and its 95 % bootstrap interval."""
    array = values.to_numpy(float)
    rng = np.random.default_rng(0)
    means = array[rng.integers(0, len(array), (draws, len(array)))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{array.mean():.3f} [{low:.3f}, {high:.3f}]"


def comparison(results: pd.DataFrame) -> pd.DataFrame:
    """A row a noise and method: what each of them is worth."""
    rows = []
    for (noise, method), runs in results.groupby(["noise", "method"], sort=False):
        by_correlation = runs.groupby("correlation")["loss"].mean()
        rows.append(
            {
                "noise": f"{noise:.0%}",
                "method": method,
                "loss": interval(runs["loss"]),
                **{f"ρ {correlation:g}": f"{mean:.3f}" for correlation, mean in by_correlation.items()},
                "log loss": f"{runs['log_loss'].mean():.3f}",
                "infeasible %": interval(100 * runs["infeasible"]),
                "no choice %": f"{100 * (runs['verdict'] != 'choose').mean():.1f}",
                "confirmed %": f"{100 * runs.loc[runs['verdict'] == 'choose', 'confirmed'].mean():.0f}",
                "s a trial": f"{runs['seconds'].mean() / NUM_SAMPLES:.3f}",
            }
        )
    return pd.DataFrame(rows)


def refusals(results: pd.DataFrame) -> pd.DataFrame:
    """A row a kind of surface on which nothing is to be recommended, method and noise: how often nothing is."""
    rows = []
    for (kind, method, noise), runs in results.groupby(["kind", "method", "noise"], sort=False):
        named = {"none_feasible": "no_candidate_qualifies", "never_rerouted": "baseline_never_rerouted"}[str(kind)]
        rows.append(
            {
                "surfaces": kind,
                "method": method,
                "noise": f"{noise:.0%}",
                "refused %": interval(100 * (runs["verdict"] != "choose")),
                "by its verdict %": f"{100 * (runs['verdict'] == named).mean():.1f}",
            }
        )
    return pd.DataFrame(rows)


def reliability(results: pd.DataFrame) -> pd.DataFrame:
    """Recommendations by the probability that they were given, against the share that is truly feasible."""
    chosen = results[results["verdict"].eq("choose") & results["probability"].notna()]
    edges = (0.95, 0.97, 0.98, 0.99, 0.995, 1.0)
    rows = []
    for low, high in [*itertools.pairwise(edges), (0.95, 1.0)]:
        within = chosen[(chosen["probability"] >= low) & ((chosen["probability"] < high) | (high == 1.0))]
        if len(within):
            feasible = 100 * (1 - within["infeasible"])
            rows.append({"P": f"{low:g}–{high:g}", "runs": len(within), "mean P": f"{within['probability'].mean():.3f}",
                         "truly feasible %": interval(feasible)})  # fmt: skip
    return pd.DataFrame(rows)


def jobs(
    runs: int,
    seed: int,
    family: Family,
    methods: Sequence[str],
    noises: Sequence[float],
    failing: tuple[Failing, float],
) -> list[Job]:
    """Every sweep to simulate, the costly ones first."""
    reachable = [
        Job(method, noise, CORRELATIONS[run % len(CORRELATIONS)], run, seed, family, "reachable", *failing)
        for noise in noises
        for method in methods
        for run in range(runs)
    ]
    shares: dict[Kind, float] = {"none_feasible": 0.5, "never_rerouted": 0.1}
    refused = [
        Job(method, noise, CORRELATIONS[run % len(CORRELATIONS)], run, seed, family, kind, *failing)
        for kind, share in shares.items()
        for noise in noises
        for method in methods
        if method in PLANS and method != "plan, stopping early"
        for run in range(int(share * runs))
    ]
    return reachable + refused


def main() -> None:
    """Simulate and print the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="60 runs a cell in place of --runs")
    parser.add_argument("--runs", type=int, default=510, help="sweeps a cell (noise × method)")
    parser.add_argument("--seed", type=int, default=0, help="of the surfaces that are drawn")
    parser.add_argument("--family", choices=get_args(Family), default="softplus")
    parser.add_argument("--failing", choices=get_args(Failing), default="none")
    parser.add_argument("--rate", type=float, default=0.0, help="of runs that fail")
    parser.add_argument("--methods", nargs="+", default=[*PLANS, *PEERS], choices=[*PLANS, *PEERS])
    parser.add_argument("--noises", nargs="+", type=float, default=list(NOISES))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    runs = 60 if options.quick else options.runs
    failing = (options.failing, options.rate)
    planned = jobs(runs, options.seed, options.family, options.methods, options.noises, failing)
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        results = pd.DataFrame(pool.map(simulate, planned, chunksize=10))
    reachable = results[results["kind"] == "reachable"]
    print(
        f"{runs} sweeps a cell of {NUM_SAMPLES} trials, family {options.family}, seed {options.seed}, "
        f"failing: {options.failing} {options.rate:.0%}\n"
    )
    print(comparison(reachable).to_string(index=False), "\n")
    print(refusals(results[results["kind"] != "reachable"]).to_string(index=False), "\n")
    print(reliability(reachable).to_string(index=False))
    print(f"\n{len(results)} sweeps in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
