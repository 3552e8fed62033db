"""Trials to replay the stopping rule over: recorded runs of the tiny preset under overrides, and simulated ones."""

import multiprocessing
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pandas as pd

from analysis.constraint import absolute_tolerance, reroute_regression

Setting = tuple[float, float]
Curve = dict[int, float]
SEEDS = range(5)
TOLERANCE = 0.05
EVALUATIONS = 10
"""Evaluations of a run that are recorded; every second one is what the preset itself makes."""
COLUMNS = ["world", "beta_kl", "kl_temperature", "seed", "step", "loss"]


def spread(count: int) -> tuple[Setting, ...]:
    """Settings that fill [1e-3, 2] (log) × [1, 4] evenly: the first points of the R2 sequence (Roberts 2018)."""
    unit = (0.5 + np.outer(np.arange(1, count + 1), (0.7548776662466927, 0.5698402909980532))) % 1
    betas, temperatures = 1e-3 * 2000 ** unit[:, 0], 1 + 3 * unit[:, 1]
    return tuple((float(f"{beta:.3g}"), float(f"{heat:.3g}")) for beta, heat in zip(betas, temperatures, strict=True))


@dataclass(frozen=True)
class World:
    """Runs of the tiny preset under some overrides."""

    overrides: dict[str, float]
    spread: tuple[Setting, ...]
    """Settings that stand for the searched space."""
    border: tuple[Setting, ...]
    """Settings close to the constraint's border, or strong ones that are still feasible."""


WORLDS = {
    "default": World({}, spread(12), ((0.4, 1.0), (0.6, 1.0), (0.2, 2.0), (0.26, 2.0), (0.2, 4.0), (0.28, 4.0))),
    "late": World(
        {"lr": 8e-4, "warmup_steps": 70},
        spread(12),
        ((0.05, 1.0), (0.1, 1.0), (0.02, 2.0), (0.04, 2.0), (0.01, 4.0), (0.02, 4.0)),
    ),
    "laggards": World(
        {"steps": 120, "warmup_steps": 90},
        spread(6),
        ((1.0, 1.0), (1.5, 1.0), (0.4, 2.0), (0.6, 2.0), (0.3, 4.0), (0.5, 4.0)),
    ),
}


@dataclass(frozen=True)
class Trial:
    """A search trial of which everything is known, and the baselines that its rule is made from."""

    baselines: dict[int, Curve]
    seed: int
    curve: Curve
    steps: int
    tolerance: float
    feasible: bool
    """Of its setting, truly."""


def record(run: tuple[str, float, float, int, Path]) -> list[tuple]:
    """Train one setting on one thread; its held-out reroute losses as rows of `COLUMNS`."""
    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    import torch

    from cbtrain.config import get_config
    from cbtrain.model import loading
    from cbtrain.training import loop

    torch.set_num_threads(1)
    world, beta_kl, kl_temperature, seed, cache = run
    config = loading.resolve(get_config("tiny", **WORLDS[world].overrides))
    config = replace(config, beta_kl=beta_kl, kl_temperature=kl_temperature, seed=seed)
    config.eval_every = config.steps // EVALUATIONS
    rows = []

    def keep(metrics: dict[str, float]) -> None:
        if "eval_loss_reroute" in metrics:
            rows.append((*run[:4], metrics["step"], metrics["eval_loss_reroute"]))

    with tempfile.TemporaryDirectory() as directory:
        loop.train(config, Path(directory), keep, teacher_cache=cache)
    return rows


def recorded(directory: Path, processes: int) -> pd.DataFrame:
    """Every curve in rows of `COLUMNS`; runs that the directory holds are not run again."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "curves.csv"
    if not path.is_file():
        path.write_text(",".join(COLUMNS) + "\n")
    held = {tuple(run) for run in pd.read_csv(path)[COLUMNS[:4]].to_numpy().tolist()}
    wanted = [
        (name, *setting, seed)
        for name, world in WORLDS.items()
        for setting, seed in product([(0.0, 1.0), *world.spread, *world.border], SEEDS)
    ]
    missing = [(*run, directory / "teacher_cache") for run in wanted if run not in held]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for rows in pool.map(record, missing):
            pd.DataFrame(rows, columns=COLUMNS).to_csv(path, mode="a", header=False, index=False)
    return pd.read_csv(path)


def recorded_trials(table: pd.DataFrame, settings: Iterable[Setting], every: int) -> Iterator[Trial]:
    """Each run of a world's table with each choice of 3 or 4 baselines that has its own among them.

    A setting is feasible where its regression against the paired baselines, averaged over all seeds, is ≤ 0.
    """
    steps = int(table.step.max())
    kept = table[table.step % (every * steps // EVALUATIONS) == 0]
    curves: dict[tuple[float, float, int], Curve] = {
        key: dict(zip(run.step.astype(int), run.loss, strict=True))
        for key, run in kept.groupby(["beta_kl", "kl_temperature", "seed"])
    }
    baselines = {seed: curves[0.0, 1.0, seed] for seed in SEEDS}
    final = {seed: curve[steps] for seed, curve in baselines.items()}
    true_tolerance = absolute_tolerance(final.values(), TOLERANCE)
    for setting in settings:
        runs = {seed: curves[*setting, seed] for seed in SEEDS}
        regressions = [reroute_regression(runs[seed][steps], seed, final, true_tolerance) for seed in SEEDS]
        for seed, chosen in product(SEEDS, [*combinations(SEEDS, 3), *combinations(SEEDS, 4)]):
            if seed in chosen:
                tolerance = absolute_tolerance([final[other] for other in chosen], TOLERANCE)
                known = {other: baselines[other] for other in chosen}
                yield Trial(known, seed, runs[seed], steps, tolerance, bool(np.mean(regressions) <= 0))


def simulated_curve(
    final: float, evaluations: int, collapse: float, width: float, rng: np.random.Generator, noise: float = 0.002
) -> Curve:
    """A run's `eval_loss_reroute` by step, in which an evaluation is a step.

    Args:
        final: the loss that the run ends at, but for what is left of the collapse.
        evaluations: how many, evenly spaced, the last one at the end.
        collapse: the share of its steps at which the loss is half way down from 0.85.
        width: of the sigmoid, as a share of the steps.
        rng: draws the noise of each evaluation, of standard deviation `noise`.
    """
    done = np.arange(1, evaluations + 1) / evaluations
    loss = final + (0.85 - final) / (1 + np.exp((done - collapse) / width))
    loss = np.clip(loss + noise * rng.standard_normal(evaluations), 0, 1)
    return dict(enumerate(loss.tolist(), start=1))


class SimulatedSweep:
    """Runs whose rerouting collapses after 40 to 60 % of the steps, over 3 to 10 % of them."""

    def __init__(self, seeds: int, evaluations: int, rng: np.random.Generator) -> None:
        self._rng, self._evaluations = rng, evaluations
        self._middle, self.width = rng.uniform(0.4, 0.6), rng.uniform(0.03, 0.1)
        self._shifts, self._levels = 0.02 * rng.standard_normal(seeds), 0.013 + 0.002 * rng.standard_normal(seeds)

    def run(self, seed: int, lost: float = 0.0, later: float = 0.0) -> Curve:
        """A run that loses so much rerouting at the end, and collapses later by a share of the steps."""
        collapse = self._middle + self._shifts[seed] + later + 0.01 * self._rng.standard_normal()
        final = max(0.0, self._levels[seed] + lost + 0.003 * self._rng.standard_normal())
        return simulated_curve(final, self._evaluations, collapse, self.width, self._rng)


def simulated_trials(
    lag: float, evaluations: int, sweeps: int = 200, per_sweep: int = 10, seeds: int = 4
) -> Iterator[Trial]:
    """Search trials of simulated sweeps; 28 % are infeasible, by one more tolerance on average.

    A trial collapses later the more it loses: at the constraint's border by `lag` widths of the collapse on average.
    """
    rng = np.random.default_rng(0)
    for _ in range(sweeps):
        sweep = SimulatedSweep(seeds, evaluations, rng)
        baselines = {seed: sweep.run(seed) for seed in range(seeds)}
        tolerance = absolute_tolerance([curve[evaluations] for curve in baselines.values()], TOLERANCE)
        for index in range(per_sweep):
            feasible = bool(rng.random() >= 0.28)
            lost = rng.uniform(0, 1) if feasible else 1 + rng.exponential(1)
            later = lag * sweep.width * lost * rng.uniform(0.5, 1.5)
            curve = sweep.run(index % seeds, lost * tolerance, later)
            yield Trial(baselines, index % seeds, curve, evaluations, tolerance, feasible)
