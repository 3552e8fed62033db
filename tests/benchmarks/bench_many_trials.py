"""Does a decision that rests on 300 of 1,000 trials say what one on all of them says, and how long does each take?

    python -m tests.benchmarks.bench_many_trials [--sweeps 200] [--trials 1000] [--processes 2]

Drawn surfaces (`surfaces.py`; every tenth has nothing to recommend, every fourth other sweep 5 % of trials that fail),
noise of 2 %: four baseline seeds, the four ablation points at two seeds each, and the rest spread over the searched
space, half of them near the point that truly is best, as a search would. `decide` as the commands call it, and with
the same hyper-parameter draws but every trial in the model.

Two x86-64 cores, 2026-11-27, 10 sweeps of 1,000 trials and 8 of 500: the same verdict at all, the same setting at 20
and 38 % (of hundreds nearly alike); 2.9 and 2.4 s on some, 65 and 9.6 s on all; all recommendations truly feasible by
both, true drift of the pick 1.20 and 1.28 times the best, on all 1.19 and 1.25 (medians). 200 sweeps of 1,000 take two
hours and were not run.
"""

import argparse
import dataclasses
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from typing import Any

os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"))

import numpy as np
import pandas as pd

from analysis import decide as decide_module
from analysis.decision import Decision
from analysis.surrogate import surrogate
from sweeps.plan.journal import TrialSpec
from tests.benchmarks.surfaces import TOLERANCE, Surface, World, draw_surface

NOISE, CORRELATION = 0.02, 0.5
SEEDS = range(4)
ABLATION = ((0.1, 1.0), (0.3, 1.0), (0.5, 1.0), (0.3, 2.0))


def main() -> None:
    """Both decisions of each sweep, and their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", type=int, default=200)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    jobs = [(seed, arguments.trials) for seed in range(arguments.sweeps)]
    with ProcessPoolExecutor(arguments.processes) as pool:
        results = pd.DataFrame(pool.map(both, *zip(*jobs, strict=True)))
    print(f"{len(results)} sweeps of {arguments.trials} trials")
    print(f"same verdict {results.same_verdict.mean():.1%}, same setting {results.same_setting.mean():.1%}")
    for which in ("some", "all"):
        chosen = results[f"{which}_feasible"].dropna()
        print(
            f"{which:>4} modelled: {results[f'{which}_s'].mean():.1f} s (at most {results[f'{which}_s'].max():.1f}), "
            f"{len(chosen)} choose, {chosen.mean():.1%} of them truly feasible, "
            f"true drift of the pick over the best {results[f'{which}_over'].median():.3f} (median)"
        )


def both(seed: int, trials: int) -> dict[str, Any]:
    """One sweep decided by some of its trials and by all."""
    rng = np.random.default_rng([seed, 7])
    surface = draw_surface(rng, "softplus", "none_feasible" if seed % 10 == 9 else "reachable")
    rows = sweep(surface, seed, trials, rng)
    found: dict[str, Any] = {}
    decisions = {}
    limit = surrogate.MAX_MODELLED
    for which, most in (("some", limit), ("all", trials)):
        surrogate.MAX_MODELLED = decide_module.MAX_MODELLED = most
        started = time.perf_counter()
        decisions[which] = decide_module.decide(rows)
        found[f"{which}_s"] = time.perf_counter() - started
        found |= {f"{which}_{name}": value for name, value in truth(surface, decisions[which]).items()}
    surrogate.MAX_MODELLED = decide_module.MAX_MODELLED = limit
    some, every = decisions["some"], decisions["all"]
    found["same_verdict"] = some.verdict == every.verdict
    found["same_setting"] = (some.beta_kl, some.kl_temperature) == (every.beta_kl, every.kl_temperature)
    return found


def sweep(surface: Surface, seed: int, trials: int, rng: np.random.Generator) -> pd.DataFrame:
    """`trials.csv` of a sweep."""
    world = World(surface, NOISE, CORRELATION, seed, "trials" if seed % 4 == 0 else "none", 0.05)
    settings = [(0.0, 1.0, "baseline", each) for each in SEEDS]
    settings += [(*point, "ablation", each) for point in ABLATION for each in SEEDS[:2]]
    beta, heat = _best(surface)
    while len(settings) < trials:
        near = len(settings) % 2 == 0
        weight = beta * math.exp(rng.normal(0, 0.3)) if near else math.exp(rng.uniform(math.log(1e-3), math.log(2)))
        temperature = heat + rng.normal(0, 0.3) if near else rng.uniform(1, 4)
        point = float(np.clip(weight, 1e-3, 2)), float(np.clip(temperature, 1, 4))
        settings.append((*point, "search", len(settings) % len(SEEDS)))
    rows = []
    for number, (weight, temperature, phase, of_seed) in enumerate(settings):
        spec = TrialSpec(f"t{number:03}", phase, weight, temperature, of_seed)  # type: ignore[arg-type]
        outcome = world(spec)
        told = dataclasses.asdict(outcome)
        rows.append(dataclasses.asdict(spec) | told.pop("metrics") | told)
    return pd.DataFrame(rows)


def truth(surface: Surface, decision: Decision) -> dict[str, float]:
    """Whether a recommendation truly is feasible, and its drift over the best; NaN without one."""
    if decision.beta_kl is None or decision.kl_temperature is None:
        return {"feasible": math.nan, "over": math.nan}
    lost = float(surface.lost(decision.beta_kl, decision.kl_temperature))
    drift = float(surface.drift(decision.beta_kl, decision.kl_temperature))
    return {"feasible": float(lost <= TOLERANCE), "over": drift / surface.best_drift}


def _best(surface: Surface) -> tuple[float, float]:
    """The feasible setting of a grid with the least drift; the middle where there is none."""
    beta, heat = np.meshgrid(np.geomspace(1e-3, 2, 101), np.linspace(1, 4, 31))
    drift = np.where(surface.lost(beta, heat) <= TOLERANCE, surface.drift(beta, heat), np.inf)
    place = int(drift.argmin())
    return (float(beta.flat[place]), float(heat.flat[place])) if np.isfinite(drift.min()) else (0.05, 2.0)


if __name__ == "__main__":
    main()
