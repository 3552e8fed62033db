"""When a search trial is stopped early: when its rerouting stays beyond the constraint and will not get back.

A trial is compared with the finished `beta_kl = 0` baseline of its own seed at the same step. Drift tells nothing
early: the trials that will not reroute drift least.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, variance
from typing import TYPE_CHECKING

from analysis.formatting import count
from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.utils.metrics_file import read_metrics

if TYPE_CHECKING:
    from sweeps.plan.journal import TrialSpec
    from sweeps.plan.plan import SweepPlan

Z = 1.64
"""Standard errors beyond the tolerance: the one-sided 95 % point of a normal distribution."""
START_PERCENT = 30
"""Per cent of the steps that a trial has for certain."""
MIN_BASELINES = 3
"""Completed baselines below which their spread says too little to stop anything."""
MIN_EVALUATIONS = 3
"""Held-out evaluations of a whole run below which no two of them are judged."""


class StoppedEarly(Exception):
    """A trial ends its own training because of its `StopRule`. The text is the reason."""

    def __init__(self, reason: str, metrics: Mapping[str, float]) -> None:
        """
        Args:
            reason: one line.
            metrics: of the evaluation at which it ends.
        """
        super().__init__(reason)
        self.metrics = dict(metrics)


@dataclass(frozen=True)
class StopRule:
    """The limits of one trial. Losses are held-out `eval_loss_reroute`, steps are optimizer updates."""

    limits: dict[int, float]
    """The largest loss with which the trial goes on, by step; at other steps it is not judged."""
    baseline: dict[int, float]
    """The paired baseline's loss at these steps."""
    goal: float
    """The largest loss within tolerance at the last step: the paired baseline's own there + tolerance."""
    steps: int
    """Of a whole run."""

    def reason(self, curve: Mapping[int, float]) -> str:
        """Why the trial is stopped, in one line for trials.csv; empty while it goes on.

        It is stopped when its last two evaluations are both over their limits and the loss, were it to fall until
        the last step as fast as between these two, would still end above the goal.

        Args:
            curve: the trial's own losses by step, so far.
        """
        last = sorted(curve)[-2:]
        if len(last) < 2 or not all(step in self.limits and curve[step] > self.limits[step] for step in last):
            return ""
        before, step = last
        rate = min(0.0, (curve[step] - curve[before]) / (step - before))
        if curve[step] + rate * (self.steps - step) <= self.goal:
            return ""
        return (
            f"step {step}: held-out reroute {curve[step]:.4f} is over {self.limits[step]:.4f} (baseline "
            f"{self.baseline[step]:.4f}), as at step {before}, and falls too slowly to end at {self.goal:.4f}"
        )


def stop_rule(curves: Mapping[int, Mapping[int, float]], seed: int, steps: int, tolerance: float) -> StopRule | None:
    """The rule for a search trial; None where the baselines do not carry one.

    The limit at a step is the paired baseline's loss + `tolerance` + `Z` standard errors of one pair's difference.
    That error is √2 σ, σ being the spread over the baselines' seeds, as if the two of a pair were independent: a
    trial near the border of the constraint varies more than its baseline. Of the σ at that step and the σ pooled
    over all judged steps the larger counts, since three or four losses often lie close together by chance.

    Args:
        curves: held-out `eval_loss_reroute` by step of each completed baseline, by seed.
        seed: the trial's.
        steps: optimizer updates of a whole run. The first `START_PERCENT` are not judged, nor is the last step.
        tolerance: the value of `analysis.constraint.absolute_tolerance`, the same at each step.
    """
    paired = curves.get(seed, {})
    if not math.isfinite(paired.get(steps, math.nan)) or len(curves) < MIN_BASELINES:
        return None
    at_step = {step: [curve.get(step, math.nan) for curve in curves.values()] for step in paired}
    variances = {
        step: variance(losses)
        for step, losses in at_step.items()
        if 100 * step >= START_PERCENT * steps and step < steps and all(map(math.isfinite, losses))
    }
    if not variances:
        return None
    pooled = fmean(variances.values())
    errors = {step: math.sqrt(2 * max(here, pooled)) for step, here in variances.items()}
    return StopRule(
        limits={step: paired[step] + tolerance + Z * error for step, error in errors.items()},
        baseline={step: paired[step] for step in errors},
        goal=paired[steps] + tolerance,
        steps=steps,
    )


def rule_for(spec: "TrialSpec", plan: "SweepPlan", trials: Path, steps: int) -> StopRule | None:
    """The rule that a trial of the plan is handed out with; None for all but search trials.

    Args:
        spec: the trial.
        plan: whose completed baselines it is compared with.
        trials: the directory of all trials, with the baselines' `metrics.jsonl`.
        steps: optimizer updates of a whole run.
    """
    if spec.phase != "search" or plan.tolerance is None:
        return None
    sound = plan.sound_baselines()
    baselines = [row for row in plan.rows() if row["phase"] == "baseline" and row["seed"] in sound]
    curves = {int(str(row["seed"])): held_out_curve(trials / str(row["trial_id"])) for row in baselines}
    return stop_rule({seed: curve for seed, curve in curves.items() if curve}, spec.seed, steps, plan.tolerance)


def held_out_curve(trial: Path) -> dict[int, float]:
    """Held-out `eval_loss_reroute` by step in a trial's `metrics.jsonl`; empty where there is none.

    A half-written line, as a killed run leaves it, does not count.
    """
    logged = read_metrics(trial / "metrics.jsonl", skip_damaged=True)
    return {
        int(metrics["step"]): float(metrics["eval_loss_reroute"])
        for metrics in logged
        if "eval_loss_reroute" in metrics
    }


def judge(rule: StopRule, curve: dict[int, float], metrics: Mapping[str, float]) -> None:
    """Put a held-out evaluation into the trial's curve, from which what an earlier attempt did later goes.

    Raises:
        StoppedEarly: the rule ends the trial here.
    """
    now = int(metrics["step"])
    for step in [step for step in curve if step > now]:
        del curve[step]
    curve[now] = metrics["eval_loss_reroute"]
    if reason := rule.reason(curve):
        raise StoppedEarly(reason, metrics)


def require_stoppable(config: CircuitBreakerConfig, baselines: int) -> None:
    """Check that `--early-stop` can stop anything.

    Raises:
        InputError: trials are evaluated too seldom, or there are too few baselines.
    """
    every, steps = config.eval_every, config.steps
    evaluations = -(-steps // every) if every else 1
    if evaluations < MIN_EVALUATIONS:
        mend = f"give --eval-every {max(1, steps // 5)} or leave --early-stop out"
        if steps < MIN_EVALUATIONS:
            mend = "give more --steps or leave --early-stop out"
        raise InputError(
            f"--early-stop: with --eval-every {every} a trial of {count(steps, 'step')} has "
            f"{count(evaluations, 'held-out evaluation')}, stopping needs {MIN_EVALUATIONS}; {mend}"
        )
    if baselines < MIN_BASELINES:
        raise InputError(
            f"--early-stop: {count(baselines, 'baseline seed')}, stopping needs {MIN_BASELINES}; "
            f"give --baseline-seeds {MIN_BASELINES} or leave --early-stop out"
        )
