"""Whether early stopping may be on: the rule replayed over recorded and simulated curves.

    python -m tests.benchmarks.bench_stopping [--processes 2] [--record DIRECTORY]

The bar for being on by default: at most 1.5 % of the truly feasible trials are stopped, with late collapse too, and
8 % of the steps are saved. The rule passes the first on every recorded world, though not where a collapse is simulated
to come two of its widths late, and misses the second, so it is off. In brackets what two evaluations in a row over
their limits would do by themselves, without the rule's look ahead to the last step: stop half of the feasible trials
of `laggards`, which catch up with their baselines later.

Measured on two shared x86-64 cores (torch 2.13, CPU), 2026-11-22; 255 curves, tolerance 0.049:

    a run's evaluations, settings         trials  feasible   % killed      % stopped     % steps saved
    default      10  spread                  600       450   0.0 ( 0.0)   80.7 ( 81.3)    8.9 (11.7)
                     all                     900       650   1.1 ( 1.2)   57.2 ( 57.6)    6.9 ( 8.9)
                  5  spread                  600       450   0.0 ( 0.0)   80.0 ( 80.0)    6.7 ( 7.7)
                     all                     900       650   0.0 ( 0.0)   56.0 ( 56.0)    4.9 ( 5.6)
    late         10  spread                  600       350   0.0 ( 0.0)   68.4 ( 69.6)   12.8 (13.2)
                     all                     900       550   0.0 ( 0.0)   48.9 ( 49.7)    8.5 ( 8.8)
                  5  spread                  600       350   0.0 ( 0.0)   61.2 ( 66.4)    9.3 ( 9.7)
                     all                     900       550   0.0 ( 0.0)   43.7 ( 47.4)    6.2 ( 6.5)
    laggards     10  spread                  300       300   0.0 (16.7)       -           0.0 (10.0)
                     all                     600       500   0.2 (48.6)    2.0 (100.0)    0.0 (34.3)
                  5  spread                  300       300   0.0 ( 4.0)       -           0.0 ( 1.6)
                     all                     600       500   0.0 (33.0)    0.0 (100.0)    0.0 (17.7)
    recorded     10  all                    2400      1700   0.5 (14.8)   45.1 ( 59.7)    5.8 (15.2)
                  5  all                    2400      1700   0.0 ( 9.7)   41.9 ( 58.0)    4.1 ( 8.9)
    simulated    10  lag 0.2 widths         2000      1464   0.0 ( 0.2)   28.7 ( 34.0)    1.5 ( 3.3)
                     lag 0.5                                 0.0 ( 3.4)   31.0 ( 55.6)    2.4 ( 7.1)
                     lag 1                                   1.0 (16.4)   46.1 ( 80.4)    5.6 (14.3)
                     lag 2                                  12.4 (41.2)   73.5 ( 95.5)   13.4 (24.4)
                  5  lag 0.2                2000      1437   0.0 ( 0.0)    6.9 ( 22.4)    0.4 ( 1.5)
                     lag 0.5                                 0.0 ( 0.9)    5.9 ( 38.9)    0.5 ( 3.4)
                     lag 1                                   0.1 ( 4.9)   17.9 ( 56.0)    1.7 ( 6.0)
                     lag 2                                   2.4 (20.4)   44.0 ( 76.0)    4.7 (11.4)

Baselines collapse to half their loss after 15 % of the steps (`default`), 44 % (`late`), 21 % (`laggards`) and 40 to
60 % (`simulated`). Settings at the border lag them there by 0.2 widths of the collapse in the first two worlds and by
1 to 2 in `laggards`. The preset makes 5 evaluations. One takes as long as 2.3 steps (`eval_s` beside `train_s`), so
that the 5 more that save 2 % of the steps cost 16 %.

killed: feasible trials that are stopped; stopped: infeasible ones; spread: settings that stand for the searched
space; all: also those near the border. A setting is feasible if the mean regression of its 5 seeds is ≤ 0.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from sweeps.plan.early_stopping import StopRule, stop_rule
from tests.benchmarks.stopping_trials import (
    COLUMNS,
    EVALUATIONS,
    WORLDS,
    Curve,
    Trial,
    recorded,
    recorded_trials,
    simulated_trials,
)


def over_twice(rule: StopRule, curve: Curve) -> bool:
    """The rule without its look ahead: two evaluations in a row over their limits."""
    return len(curve) > 1 and all(curve[step] > rule.limits.get(step, 1) for step in sorted(curve)[-2:])


def saved(trial: Trial, stops: Callable[[StopRule, Curve], object]) -> float:
    """Share of a trial's steps that are not run; 0 where it is not stopped."""
    rule = stop_rule(trial.baselines, trial.seed, trial.steps, trial.tolerance)
    assert rule is not None
    for step in trial.curve:
        if stops(rule, {done: loss for done, loss in trial.curve.items() if done <= step}):
            return 1 - step / trial.steps
    return 0.0


def summary(trials: Iterable[Trial]) -> dict[str, str]:
    """What stopping does to trials, and in brackets what it does without the look ahead."""
    trials = list(trials)
    feasible = np.array([trial.feasible for trial in trials])
    both = [np.array([saved(trial, stops) for trial in trials]) for stops in (StopRule.reason, over_twice)]

    def share(values: list[np.ndarray]) -> str:
        here, without = (f"{100 * value.mean():.1f}" if value.size else "-" for value in values)
        return f"{here} ({without})"

    return {
        "trials": str(len(trials)),
        "feasible": str(feasible.sum()),
        "% killed": share([values[feasible] > 0 for values in both]),
        "% stopped": share([values[~feasible] > 0 for values in both]),
        "% steps saved": share(both),
    }


def main() -> None:
    """Record what is missing, replay, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--record", type=Path, help="directory that keeps the curves for another replay")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        table = recorded(arguments.record or Path(directory), arguments.processes)
    rows = {}
    for every in (1, 2):
        made, together = f"{EVALUATIONS // every} evaluations", []
        for name, world in WORLDS.items():
            curves = table[table.world == name]
            even = list(recorded_trials(curves, world.spread, every))
            near = list(recorded_trials(curves, world.border, every))
            rows[f"{name}, {made}, spread"] = summary(even)
            rows[f"{name}, {made}, all"] = summary(even + near)
            together += even + near
        rows[f"recorded, {made}, all"] = summary(together)
    for evaluations, lag in product((10, 5), (0.2, 0.5, 1.0, 2.0)):
        name = f"simulated, {evaluations} evaluations, lag {lag:g} widths"
        rows[name] = summary(simulated_trials(lag, evaluations))
    print(f"{table.groupby(COLUMNS[:4]).ngroups} curves; in brackets: without the look ahead\n")
    print(pd.DataFrame(rows).T.to_string())


if __name__ == "__main__":
    main()
