"""What a plan costs at a scale beyond any sweep: seconds a trial, memory, and Ray Tune's share of it.

    python -m tests.benchmarks.bench_plan [--trials 10000] [--tune-trials 500]

The first part asks a plan over a journal on disk for every trial and tells it a simulated outcome, four running at a
time. The second runs trials that do nothing through Ray Tune with the sweep's searcher, and tells the driver's seconds
a trial from what the plan took of them.

Two shared x86-64 cores, 2026-11-23, 10,000 trials: 76 ms a trial, 0.32 GiB (752 ms at trials 100–300, where the
Gaussian process is at its largest; 44 at 1,000–3,000, 65 beyond, confirmation included).
500 through Ray Tune: 359 ms a trial, of which the plan 285.
"""

import argparse
import itertools
import os
import resource
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from sweeps.plan.budget import PlanSettings
from sweeps.plan.journal import TrialSpec
from sweeps.plan.plan import SweepPlan
from tests.benchmarks.surfaces import World, draw_surface

CONCURRENCY = 4


def world() -> World:
    """A surface with a little noise."""
    return World(draw_surface(np.random.default_rng(1), "softplus", "reachable"), 0.01, 0.5, 0)


def journalled(folder: str, trials: int) -> SweepPlan:
    """A plan over a journal on disk."""
    storage = JournalStorage(JournalFileBackend(str(Path(folder, "study.log"))))
    return SweepPlan(PlanSettings(num_samples=trials), storage)


def by_plan(trials: int) -> None:
    """Print what the plan takes a trial, by hundreds of trials up to its Gaussian process's limit and beyond."""
    outcome = world()
    with tempfile.TemporaryDirectory() as folder:
        plan, spent, running = journalled(folder, trials), [], list[TrialSpec]()
        while not plan.done:
            started = time.perf_counter()
            while len(running) < CONCURRENCY and (spec := plan.ask()) is not None:
                running.append(spec)
            asked = time.perf_counter() - started
            spec = running.pop(0)
            result = outcome(spec)
            started = time.perf_counter()
            plan.tell(spec.trial_id, result)
            spent.append(asked + time.perf_counter() - started)
        size = Path(folder, "study.log").stat().st_size
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{trials:,} trials through SweepPlan, {CONCURRENCY} at a time, journal of {size / 2**20:.0f} MiB on disk")
    print(f"  {1000 * np.mean(spent):.1f} ms a trial, peak memory {peak:.2f} GiB")
    edges = sorted({0, *(edge for edge in (100, 300, 1000, 3000) if edge < trials), trials})
    for low, high in itertools.pairwise(edges):
        print(f"  trials {low:>6,}–{high:<6,}  {1000 * np.mean(spent[low:high]):7.1f} ms a trial")


def no_op(spec: dict[str, Any]) -> None:
    """A trial that reports at once."""
    from ray import tune

    outcome = asdict(world()(TrialSpec(**spec)))
    tune.report({**outcome.pop("metrics"), **outcome})


def by_tune(trials: int) -> None:
    """Print the driver's seconds a trial under Ray Tune, with those of the plan."""
    from ray import tune

    from sweeps.execution.searcher import PlanSearcher
    from sweeps.runtime.ray_start import started_ray

    class Timed(PlanSearcher):
        spent = 0.0

        def suggest(self, trial_id: str) -> dict[str, object] | str | None:
            started = time.perf_counter()
            try:
                return super().suggest(trial_id)
            finally:
                self.spent += time.perf_counter() - started

        def on_trial_complete(self, *arguments: Any, **named: Any) -> None:
            started = time.perf_counter()
            super().on_trial_complete(*arguments, **named)
            self.spent += time.perf_counter() - started

    with tempfile.TemporaryDirectory() as folder, started_ray():
        searcher = Timed(journalled(folder, trials))
        tuner = tune.Tuner(
            tune.with_resources(no_op, {"CPU": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=trials, max_concurrent_trials=os.cpu_count(), reuse_actors=True
            ),
            run_config=tune.RunConfig(name="tune", storage_path=folder, verbose=0),
        )
        started = time.perf_counter()
        tuner.fit()
        wall = time.perf_counter() - started
        if searcher.failure is not None:
            raise searcher.failure
    told = sum(row["status"] == "completed" for row in searcher.plan.rows())
    print(f"{told} no-op trials through Ray Tune, {os.cpu_count()} at a time: {1000 * wall / trials:.0f} ms a trial")
    print(f"  of which the plan {1000 * searcher.spent / trials:.0f} ms")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--tune-trials", type=int, default=500)
    options = parser.parse_args()
    by_plan(options.trials)
    by_tune(options.tune_trials)


if __name__ == "__main__":
    main()
