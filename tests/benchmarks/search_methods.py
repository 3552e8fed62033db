"""What `bench_search` compares: one simulated sweep by the plan or by a peer, and what its recommendation is worth."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import optuna
from optuna.samplers import BaseSampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from analysis.constraint import absolute_tolerance, reroute_regression
from analysis.decide import decide
from sweeps.plan.budget import PlanSettings, allocate
from sweeps.plan.early_stopping import Z
from sweeps.plan.journal import TrialOutcome, TrialSpec
from sweeps.plan.plan import SweepPlan
from sweeps.plan.sampler import BETA_KL, KL_TEMPERATURE, search_space
from tests.benchmarks.surfaces import TOLERANCE, Failing, Family, Kind, Surface, World, draw_surface

NUM_SAMPLES = 20
SETTINGS = PlanSettings(num_samples=NUM_SAMPLES)
SEEDS_A_RUN = allocate(SETTINGS).baseline
"""How far apart the first seeds of two runs are."""
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
    failing: Failing = "none"
    rate: float = 0.0
    num_samples: int = NUM_SAMPLES
    """Trials in all."""
    margin: float = 0.0
    """By how many standard deviations of the baselines' reroute loss a peer's trial must keep the limit to be taken."""

    @property
    def first_seed(self) -> int:
        return self.run * SEEDS_A_RUN

    @property
    def baselines(self) -> int:
        """Trials at beta_kl 0, for a peer as many as for the plan."""
        return allocate(PlanSettings(num_samples=self.num_samples)).baseline


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
    number = 1000 * job.seed + job.run
    world = World(surface, job.noise, job.correlation, number, job.failing, job.rate, job.first_seed)
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
    plan = SweepPlan(PlanSettings(num_samples=job.num_samples, seed=job.first_seed))
    running: list[tuple[float, TrialSpec]] = []
    now = 0.0
    while not plan.done:
        while len(running) < concurrency and (spec := plan.ask()) is not None:
            running.append((now + rng.uniform(0.9, 1.1), spec))
        now, spec = running.pop(min(range(len(running)), key=lambda index: running[index][0]))
        outcome = world(spec)
        if job.method == "plan, stopping early" and _doomed(job, plan, spec, outcome):
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


def _doomed(job: Job, plan: SweepPlan, spec: TrialSpec, outcome: TrialOutcome) -> bool:
    """Whether early stopping would have ended a trial that goes this way, judged at its last step."""
    if spec.phase != "search" or plan.tolerance is None:
        return False
    baseline = {int(str(row["seed"])): float(str(row["eval_loss_reroute"])) for row in plan.rows()[: job.baselines]}
    error = math.sqrt(2) * float(np.std(list(baseline.values()), ddof=1))
    return _required(outcome.eval_loss_reroute) - baseline[spec.seed] > plan.tolerance + Z * error


def _by_peer(job: Job, world: Callable[[TrialSpec], TrialOutcome]) -> Recommendation:
    """As many baselines, then the peer's trials on rotating seeds; the observed feasible one with least drift."""
    first, baselines = job.first_seed, job.baselines
    baseline = {
        seed: _required(world(TrialSpec(f"t{index:03d}", "baseline", 0.0, 1.0, seed)).eval_loss_reroute)
        for index, seed in enumerate(range(first, first + baselines))
    }
    tolerance = absolute_tolerance(baseline.values(), TOLERANCE)
    sampler = _peer_sampler(job)
    objectives = 2 if job.method == "NSGA-II" else 1
    study = optuna.create_study(directions=["minimize"] * objectives, sampler=sampler)
    if job.method == "grid":
        for beta_kl in np.geomspace(*SETTINGS.beta_kl_range, job.num_samples - baselines).round(5):
            study.enqueue_trial({BETA_KL: beta_kl, KL_TEMPERATURE: 1.0})
    observed: list[tuple[float, float, float, float]] = []
    seconds = 0.0
    for index in range(job.num_samples - baselines):
        started = time.perf_counter()
        trial = study.ask(search_space(SETTINGS))
        seconds += time.perf_counter() - started
        beta_kl, heat = trial.params[BETA_KL], trial.params[KL_TEMPERATURE]
        seed = first + index % baselines
        outcome = world(TrialSpec(f"t{baselines + index:03d}", "search", beta_kl, heat, seed))
        regression = reroute_regression(_required(outcome.eval_loss_reroute), seed, baseline, tolerance)
        drift = _required(outcome.eval_benign_kl)
        observed.append((regression, drift, beta_kl, heat))
        if job.method == "constrained TPE":
            trial.set_constraint("reroute_regression", regression)
        study.tell(trial, [math.log(drift), regression] if objectives == 2 else math.log(drift))
    margin = job.margin * float(np.std(list(baseline.values()), ddof=1))
    feasible = [result for result in observed if result[0] <= -margin]
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
