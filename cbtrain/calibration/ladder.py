"""Which learning rate, retain scale and steps reroute a model at all: a short ladder of runs at beta_kl = 0.

A sweep over a baseline that does not converge at every seed measures nothing. So before it, short runs are tried one
after another, each ended as soon as its outcome is clear; what happened decides what is tried next. The first recipe
that converges is run on further seeds. Whatever is not found within the steps allowed is said, not guessed.
"""

import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cbtrain.calibration.outcome import EVALUATIONS, SAID, Calibration, Outcome, Run, judge
from cbtrain.config import CircuitBreakerConfig
from cbtrain.evaluation.convergence import COLLAPSED, STILL_FALLING, collapse_steps, evaluations, unsettled
from cbtrain.training.loop import run_teacher, train
from cbtrain.training.metrics import Metrics
from cbtrain.training.non_finite import NonFiniteLossError
from cbtrain.utils import distributed

SEEDS = 3
"""On which the winner must converge."""
MARGIN = 2
"""Recommended steps are at least so many times the last collapse: other seeds are later, and retain needs its turn."""
MAX_LR = 3e-2
SCALES = (0.3, 100.0)
"""Retain scales beyond which nothing is tried."""


_CURVE = ("step", "loss_reroute", "loss_retain", "eval_loss_reroute", "eval_loss_retain_relative")
_CURVE_PREFIXES = ("eval_cosine_layer_", "eval_distance_layer_", "eval_benign_", "eval_harmful_", "base_")


class _ClearError(Exception):
    """A run's outcome is known."""


def calibrate(
    config: CircuitBreakerConfig,
    directory: Path,
    *,
    max_steps: int,
    fixed: Collection[str] = (),
    teacher_cache: Path | None = None,
    say: Callable[[str], None] = lambda _line: None,
) -> Calibration:
    """Find a recipe that reroutes; every rank calls it.

    Args:
        config: where the ladder starts; its beta_kl is not read.
        directory: for the runs, each in its own directory.
        max_steps: of all runs together.
        fixed: of `lr`, `retain_scale` and `steps`, what must stay as it is.
        teacher_cache: as for `train`.
        say: called on rank 0 with a line for each run.

    Raises:
        InputError: as `train`.
    """
    started = time.monotonic()
    if distributed.rank() == 0:
        shutil.rmtree(directory, ignore_errors=True)
    norms = run_teacher(config, teacher_cache).retain_norms
    every = max(1, config.steps // EVALUATIONS)
    config = replace(config, retain_norms=norms)
    runs = replace(config, beta_kl=0.0, eval_every=every, checkpoint_every=0)
    ladder = _Ladder(runs, directory, max_steps, teacher_cache, say)
    winners = ladder.climb(fixed)
    spent = sum(run.steps for run in ladder.runs)
    settings: dict[str, float] = {}
    reason = _why_none(ladder.runs, spent, max_steps)
    if winners:
        steps, last = config.steps, max(last_collapse(run) for run in winners)
        if "steps" not in fixed:
            steps = max(steps, -(-MARGIN * last // 10) * 10)
        settings = {"lr": winners[0].lr, "retain_scale": winners[0].retain_scale, "steps": steps}
        reason = f"Converged at {len(winners)} of {len(winners)} seeds; the last layer collapsed by step {last}."
    chosen: Any = settings | ({"steps": int(settings["steps"])} if settings else {})
    seconds = time.monotonic() - started
    return Calibration(bool(winners), reason, settings, ladder.runs, max_steps, seconds, replace(config, **chosen))


class _Ladder:
    """The runs so far, and which comes next."""

    def __init__(
        self,
        config: CircuitBreakerConfig,
        directory: Path,
        max_steps: int,
        teacher_cache: Path | None,
        say: Callable[[str], None],
    ) -> None:
        self.runs: list[Run] = []
        self._config, self._directory, self._cache, self._say = config, directory, teacher_cache, say
        self._left = max_steps

    def climb(self, fixed: Collection[str]) -> list[Run]:
        """The runs of the first recipe that converges on every seed; empty where none does."""
        rung: tuple[int, int] | None = (0, 0)
        tried: set[tuple[int, int]] = set()
        while rung is not None and self._left > 0:
            tried.add(rung)
            seeds: list[Run] = []
            for seed in range(self._config.seed, self._config.seed + SEEDS):
                seeds.append(self._run(rung, seed))
                failed = self._left_behind(seeds) if seeds[-1].outcome == "converged" else seeds[-1]
                if failed:
                    break
            else:
                return seeds
            rung = self._next(rung, failed, tried, fixed)
        return []

    def _left_behind(self, seeds: Sequence[Run]) -> Run | None:
        """The seed that rerouted least, from now on unsettled, where another is further than level runs may differ.

        Each was level, but a sweep over such seeds finds a spread that no number of them makes up for.
        """
        least, most = max(seeds, key=_reached), min(seeds, key=_reached)
        if _reached(least) - _reached(most) <= 2 * STILL_FALLING * (1 - _reached(most)):
            return None
        why = f"level at a reroute of {_reached(least):.2f}, where seed {most.seed} came to {_reached(most):.2f}"
        behind = replace(least, outcome="unsettled", why=why)
        self.runs[self.runs.index(least)] = behind
        self._tell(behind)
        return behind

    def _next(
        self, rung: tuple[int, int], run: Run, tried: set[tuple[int, int]], fixed: Collection[str]
    ) -> tuple[int, int] | None:
        """The rung to try after a run; None where there is none.

        Benign text that turned with harmful text asks for smaller steps where all collapsed at once, else for a
        stronger hold. A layer that waits asks for a weaker hold, and where that lost the benign text, for another lr.
        """
        lr, scale = rung
        faster, slower, looser, tighter = (lr + 1, scale), (lr - 1, scale), (lr, scale - 1), (lr, scale + 1)
        lost = any(earlier.outcome == "inseparable" for earlier in self.runs)
        at_once = run.outcome == "inseparable" and last_collapse(run) <= 2 * self._config.eval_every
        order: Mapping[Outcome, Sequence[tuple[int, int]]] = {
            "unmoved": (faster, looser),
            "unsettled": (looser, slower, faster) if lost else (looser, faster, slower),
            "inseparable": (slower, tighter) if at_once else (tighter, slower),
            "diverged": (slower, tighter),
        }
        for other in order.get(run.outcome, ()):
            held = ("lr" in fixed and other[0] != 0) or (
                other[1] != 0 and ("retain_scale" in fixed or self._config.retain_norm == "absolute")
            )
            if other not in tried and not held and self._in_bounds(other):
                return other
        return None

    def _recipe(self, rung: tuple[int, int]) -> tuple[float, float]:
        lr, scale = self._config.lr * _half_decades(rung[0]), self._config.retain_scale * _half_decades(rung[1])
        return float(f"{lr:.6g}"), float(f"{scale:.6g}")

    def _in_bounds(self, rung: tuple[int, int]) -> bool:
        lr, scale = self._recipe(rung)
        return lr <= max(MAX_LR, self._config.lr) and SCALES[0] <= scale <= SCALES[1]

    def _run(self, rung: tuple[int, int], seed: int) -> Run:
        """Train until the outcome is clear."""
        lr, scale = self._recipe(rung)
        config = replace(self._config, lr=lr, retain_scale=scale, seed=seed)
        started, curve = time.monotonic(), list[Metrics]()
        found: list[Outcome] = []

        def watch(metrics: Metrics) -> None:
            curve.append(metrics)
            outcome = judge(curve, config) if "eval_loss_reroute" in metrics else None
            if outcome is None and metrics["step"] >= self._left:
                outcome = "cut off"
            if outcome is not None:
                found.append(outcome)
                raise _ClearError

        try:
            train(
                replace(config, log_every=1),
                self._directory / f"{len(self.runs):02d}",
                watch,
                teacher_cache=self._cache,
            )
        except _ClearError:
            pass
        except NonFiniteLossError:
            found.append("diverged")
        evaluated = evaluations(curve)
        run = Run(
            lr=lr,
            retain_scale=scale,
            seed=seed,
            outcome=found[0],
            steps=int(curve[-1]["step"]) if curve else 1,
            collapse_step=collapse_steps(curve, config.target_layers),
            seconds=time.monotonic() - started,
            train_s=curve[-1]["train_s"] if curve else 0.0,
            eval_s=curve[-1]["eval_s"] if curve else 0.0,
            curve=[{name: value for name, value in metrics.items() if _kept(name)} for metrics in evaluated],
            why=(unsettled(curve, config.target_layers) or "") if found[0] == "unsettled" else "",
        )
        self._left -= run.steps
        self.runs.append(run)
        self._tell(run)
        return run

    def _tell(self, run: Run) -> None:
        if distributed.rank() == 0:
            self._say(run.line())


def _half_decades(exponent: int) -> float:
    """1, 3, 10, 30, … and 0.3, 0.1, …"""
    return 10.0 ** (exponent // 2) * (3 if exponent % 2 else 1)


def _reached(run: Run) -> float:
    """The held-out reroute loss at its end."""
    return run.curve[-1]["eval_loss_reroute"]


def last_collapse(run: Run) -> int:
    return max(step for step in run.collapse_step.values() if step is not None)


def _kept(name: str) -> bool:
    return name in _CURVE or name.startswith(_CURVE_PREFIXES)


def _why_none(runs: Sequence[Run], spent: int, max_steps: int) -> str:
    """Why no recipe was found, by what happened last to the ones that came furthest."""
    if runs and runs[-1].outcome == "cut off":
        recipe = (runs[-1].lr, runs[-1].retain_scale)
        seeds = sum((run.lr, run.retain_scale, run.outcome) == (*recipe, "converged") for run in runs)
        if seeds:
            return (
                f"lr {recipe[0]:g} at retain scale {recipe[1]:g} converged at {seeds} of {SEEDS} seeds when the "
                f"{max_steps} steps allowed were spent: give it more (--max-steps, in a sweep --num-samples)."
            )
    told = list(dict.fromkeys(SAID[run.outcome] for run in runs if run.outcome not in ("converged", "cut off")))
    what = "; ".join(told) or "no run came to its end"
    reached = min((metrics["eval_loss_reroute"] for run in runs for metrics in run.curve), default=1.0)
    return (
        f"No recipe converged in {spent} of {max_steps} steps allowed ({len(runs)} runs: {what}; the lowest held-out "
        f"reroute was {reached:.2f}, a layer counts as rerouted below a cosine of {COLLAPSED:g})."
    )
