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

Two shared x86-64 cores, 2026-11-23, softplus, 510 sweeps a cell of seed 0 (mean and 95 % interval):

    noise                         loss     infeasible %   confirmed %   best peer's loss
       0%         0.017 [0.014, 0.019]              0.0            96              0.159
       1%         0.066 [0.057, 0.075]              0.2            85              0.244
       2%         0.143 [0.126, 0.162]              1.2            75              0.340
       5%         0.483 [0.448, 0.518]              2.5            72              0.531

Four at a time, 210 sweeps: 0.074 at 1 % and 0.144 at 2 %; seed 1, 210 sweeps: 0.069 and 0.134. Of 1,935
recommendations 99.0 % truly feasible; of 762 surfaces with no feasible weight one was not refused.
"""

import argparse
import itertools
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import optuna
import pandas as pd
from optuna.samplers import BaseSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from analysis.constraint import absolute_tolerance, reroute_regression
from analysis.decide import decide
from sweeps.plan.budget import PlanSettings, allocate
from sweeps.plan.early_stopping import Z
from sweeps.plan.journal import TrialOutcome, TrialSpec
from sweeps.plan.plan import SweepPlan
from sweeps.plan.sampler import BETA_KL, KL_TEMPERATURE, search_space
from tests.benchmarks.surfaces import TOLERANCE, Family, Kind, Surface, World, draw_surface

NUM_SAMPLES = 20
NOISES = (0.0, 0.01, 0.02, 0.05)
CORRELATIONS = (0.0, 0.5, 0.8)
SETTINGS = PlanSettings(num_samples=NUM_SAMPLES)
BASELINES = allocate(SETTINGS).baseline
PLANS = {"plan": 1, "plan, 4 at a time": 4, "plan, stopping early": 1}
PEERS = ("random", "grid", "Sobol", "TPE", "constrained TPE", "NSGA-II")


@dataclass(frozen=True)
class Job:
    """One sweep to simulate."""

    method: str
    noise: float
    correlation: float
    run: int
    seed: int
    family: Family
    kind: Kind = "reachable"


@dataclass(frozen=True)
class Recommendation:
    """What a method says to ship; None for beta_kl where it makes no recommendation."""

    verdict: str
    beta_kl: float | None
    kl_temperature: float | None
    probability: float
    seconds: float
    """In the plan or the sampler, over all trials."""
    confirmed: bool = False
    """By two more seeds; peers confirm nothing."""


def simulate(job: Job) -> dict[str, Any]:
    """Run one sweep; its job's fields and how good its recommendation truly is."""
    surface = draw_surface(np.random.default_rng([job.seed, job.run]), job.family, job.kind)
    world = World(surface, job.noise, job.correlation, 1000 * job.seed + job.run)
    made = _by_plan(job, world, PLANS[job.method]) if job.method in PLANS else _by_peer(job, world)
    return {**vars(job), **vars(made), **_truth(surface, made)}


def _truth(surface: Surface, made: Recommendation) -> dict[str, float]:
    if made.beta_kl is None or made.kl_temperature is None:
        return {"loss": 1.0, "log_loss": 1.0, "infeasible": 0.0}
    if surface.lost(made.beta_kl, made.kl_temperature) > TOLERANCE:
        return {"loss": 1.0, "log_loss": 1.0, "infeasible": 1.0}
    drift, best, worst = float(surface.drift(made.beta_kl, made.kl_temperature)), surface.best_drift, surface.drift_0
    return {
        "loss": (drift - best) / (worst - best),
        "log_loss": math.log(drift / best) / math.log(worst / best),
        "infeasible": 0.0,
    }


def _by_plan(job: Job, world: Callable[[TrialSpec], TrialOutcome], concurrency: int) -> Recommendation:
    """A sweep of the plan with trials that take about equally long, then the decision."""
    rng = np.random.default_rng([job.seed, job.run, 3])
    started = time.perf_counter()
    plan = SweepPlan(PlanSettings(num_samples=NUM_SAMPLES, seed=job.run * BASELINES))
    running: list[tuple[float, TrialSpec]] = []
    now = 0.0
    while not plan.done:
        while len(running) < concurrency and (spec := plan.ask()) is not None:
            running.append((now + rng.uniform(0.9, 1.1), spec))
        now, spec = running.pop(min(range(len(running)), key=lambda index: running[index][0]))
        outcome = world(spec)
        if job.method == "plan, stopping early" and _doomed(plan, spec, outcome):
            outcome = replace(outcome, status="stopped", eval_benign_kl=_required(outcome.eval_benign_kl) / 10)
        plan.tell(spec.trial_id, outcome)
    decision = decide(plan.table(), reroute_tolerance=TOLERANCE)
    seconds = time.perf_counter() - started
    chosen = decision.verdict == "choose"
    return Recommendation(
        decision.verdict,
        decision.beta_kl if chosen else None,
        decision.kl_temperature if chosen else None,
        decision.probability_feasible if chosen and decision.probability_feasible is not None else math.nan,
        seconds,
        decision.confirmed,
    )


def _doomed(plan: SweepPlan, spec: TrialSpec, outcome: TrialOutcome) -> bool:
    """Whether early stopping would have ended a trial that goes this way, judged at its last step."""
    if spec.phase != "search" or plan.tolerance is None:
        return False
    baseline = {int(str(row["seed"])): float(str(row["eval_loss_reroute"])) for row in plan.rows()[:BASELINES]}
    error = math.sqrt(2) * float(np.std(list(baseline.values()), ddof=1))
    return _required(outcome.eval_loss_reroute) - baseline[spec.seed] > plan.tolerance + Z * error


def _by_peer(job: Job, world: Callable[[TrialSpec], TrialOutcome]) -> Recommendation:
    """As many baselines, then the peer's trials on rotating seeds; the observed feasible one with least drift."""
    first = job.run * BASELINES
    baseline = {
        seed: _required(world(TrialSpec(f"t{index:03d}", "baseline", 0.0, 1.0, seed)).eval_loss_reroute)
        for index, seed in enumerate(range(first, first + BASELINES))
    }
    tolerance = absolute_tolerance(baseline.values(), TOLERANCE)
    sampler = _peer_sampler(job)
    objectives = 2 if job.method == "NSGA-II" else 1
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    if job.method == "grid":
        for beta_kl in np.geomspace(*SETTINGS.beta_kl_range, NUM_SAMPLES - BASELINES).round(5):
            study.enqueue_trial({BETA_KL: beta_kl, KL_TEMPERATURE: 1.0})
    observed: list[tuple[float, float, float, float]] = []
    seconds = 0.0
    for index in range(NUM_SAMPLES - BASELINES):
        started = time.perf_counter()
        trial = study.ask(search_space(SETTINGS))
        seconds += time.perf_counter() - started
        beta_kl, heat = trial.params[BETA_KL], trial.params[KL_TEMPERATURE]
        seed = first + index % BASELINES
        outcome = world(TrialSpec(f"t{BASELINES + index:03d}", "search", beta_kl, heat, seed))
        regression = reroute_regression(_required(outcome.eval_loss_reroute), seed, baseline, tolerance)
        drift = _required(outcome.eval_benign_kl)
        observed.append((regression, drift, beta_kl, heat))
        if job.method == "constrained TPE":
            trial.set_constraint("reroute_regression", regression)
        study.tell(trial, [math.log(drift), regression] if objectives == 2 else math.log(drift))
    feasible = [result for result in observed if result[0] <= 0]
    if not feasible:
        return Recommendation("none feasible", None, None, math.nan, seconds)
    _, _, beta_kl, heat = min(feasible, key=lambda result: result[1])
    return Recommendation("choose", beta_kl, heat, math.nan, seconds)


def _peer_sampler(job: Job) -> BaseSampler:
    samplers: dict[str, Callable[[], BaseSampler]] = {
        "random": lambda: RandomSampler(seed=job.run),
        "grid": lambda: RandomSampler(seed=job.run),  # its points are enqueued
        "Sobol": lambda: QMCSampler(seed=job.run, scramble=True, warn_independent_sampling=False),
        "TPE": lambda: TPESampler(seed=job.run),
        "constrained TPE": lambda: TPESampler(seed=job.run),
        "NSGA-II": lambda: NSGAIISampler(seed=job.run, population_size=8),
    }
    return samplers[job.method]()


def _required(value: float | None) -> float:
    assert value is not None
    return value


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


def jobs(runs: int, seed: int, family: Family, methods: Sequence[str], noises: Sequence[float]) -> list[Job]:
    """Every sweep to simulate, the costly ones first."""
    reachable = [
        Job(method, noise, CORRELATIONS[run % len(CORRELATIONS)], run, seed, family)
        for noise in noises
        for method in methods
        for run in range(runs)
    ]
    shares: dict[Kind, float] = {"none_feasible": 0.5, "never_rerouted": 0.1}
    refused = [
        Job(method, noise, CORRELATIONS[run % len(CORRELATIONS)], run, seed, family, kind)
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
    parser.add_argument("--family", choices=("softplus", "hinge"), default="softplus")
    parser.add_argument("--methods", nargs="+", default=[*PLANS, *PEERS], choices=[*PLANS, *PEERS])
    parser.add_argument("--noises", nargs="+", type=float, default=list(NOISES))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    runs = 60 if options.quick else options.runs
    planned = jobs(runs, options.seed, options.family, options.methods, options.noises)
    started = time.monotonic()
    with ProcessPoolExecutor(options.processes) as pool:
        results = pd.DataFrame(pool.map(simulate, planned, chunksize=10))
    reachable = results[results["kind"] == "reachable"]
    print(f"{runs} sweeps a cell of {NUM_SAMPLES} trials, family {options.family}, seed {options.seed}\n")
    print(comparison(reachable).to_string(index=False), "\n")
    print(refusals(results[results["kind"] != "reachable"]).to_string(index=False), "\n")
    print(reliability(reachable).to_string(index=False))
    print(f"\n{len(results)} sweeps in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
