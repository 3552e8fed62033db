"""A calibration's runs: what can come of one, when that is clear, and what all of them found."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cbtrain.config import CircuitBreakerConfig
from cbtrain.evaluation.convergence import STILL_FALLING, Curve, collapse_steps, evaluations, unsettled
from cbtrain.utils.files import finite_or_none, write_whole

SCHEMA_VERSION = 1
SHARE = 5
"""Calibration takes at most one in so many of a sweep's planned steps."""
EVALUATIONS = 10
"""Of a whole run: often enough to see a layer collapse."""
UNMOVED = 0.99
"""A held-out reroute loss above which nothing has begun by a tenth of the steps."""

STAYED = 0.5
"""Share of the teacher's norm by which benign hidden states have moved at most where they stayed."""

Outcome = Literal["converged", "unmoved", "unsettled", "inseparable", "diverged", "cut off"]
SAID: dict[Outcome, str] = {
    "converged": "converged",
    "unmoved": "nothing moved",
    "unsettled": "not settled at its end",
    "inseparable": "benign text turned away with harmful text",
    "diverged": "a loss became infinite",
    "cut off": "cut off: the steps allowed were spent",
}


@dataclass(frozen=True)
class Run:
    """One run of the ladder."""

    lr: float
    retain_scale: float
    seed: int
    outcome: Outcome
    steps: int
    """Updates until its outcome was clear."""
    collapse_step: dict[int, int | None]
    """By target layer; None where it never collapsed."""
    seconds: float
    train_s: float
    eval_s: float
    curve: list[dict[str, float]] = field(default_factory=list)
    """Held-out evaluations."""
    why: str = ""

    def line(self) -> str:
        """The run in a line."""
        layers = ", ".join(f"layer {k} {'–' if step is None else step}" for k, step in self.collapse_step.items())
        why = f" ({self.why})" if self.why else ""
        return (
            f"lr {self.lr:g} retain scale {self.retain_scale:g} seed {self.seed}: {SAID[self.outcome]}{why} after "
            f"{self.steps} steps; collapsed at {layers}"
        )


@dataclass(frozen=True)
class Calibration:
    """What was found, and all runs that it rests on."""

    converged: bool
    reason: str
    """One plain sentence."""
    settings: dict[str, float]
    """`lr`, `retain_scale` and `steps`; empty where nothing converged."""
    runs: list[Run]
    max_steps: int
    wall_s: float
    config: CircuitBreakerConfig
    """Of the runs, with measured norms, and with `settings` where there are any."""

    @property
    def steps_spent(self) -> int:
        """Of all runs."""
        return sum(run.steps for run in self.runs)

    def write(self, path: Path) -> None:
        """Write calibration.json."""
        record = dataclasses.asdict(self) | {"schema_version": SCHEMA_VERSION, "steps_spent": self.steps_spent}
        write_whole(path, json.dumps(finite_or_none(record), indent=1) + "\n")


def steps_allowed(trials: int, steps: int) -> int:
    """Steps that the calibration of a sweep may take."""
    return trials * steps // SHARE


def judge(curve: Curve, config: CircuitBreakerConfig) -> Outcome | None:
    """The outcome of a run at its last held-out evaluation; None while it is not clear.

    It has converged when every target layer has collapsed and the rerouting is level from one evaluation to the next,
    while benign text stayed near where it was. Ended is it, unmoved, when nothing has begun by a tenth of its steps
    after the warm-up. Anything else is told at its end.
    """
    *_, last = evaluated = evaluations(curve)
    done = last["step"] >= config.steps
    if all(step is not None for step in collapse_steps(curve, config.target_layers).values()):
        if _separated(last, config) and (done or _level(evaluated)):
            return "unsettled" if done and unsettled(curve, config.target_layers) else "converged"
        return "inseparable" if done else None
    if done:
        cosines = [last[f"eval_cosine_layer_{layer}"] for layer in config.target_layers]
        return "unmoved" if min(cosines) > UNMOVED else "unsettled"
    begun = last["eval_loss_reroute"] <= UNMOVED or last["step"] < config.warmup_steps + config.steps // EVALUATIONS
    return None if begun else "unmoved"


def _level(evaluated: Curve) -> bool:
    """Whether the last two evaluations differ by no more than a settled run's do."""
    if len(evaluated) < 2:
        return False
    before, last = (metrics["eval_loss_reroute"] for metrics in evaluated[-2:])
    return abs(before - last) <= STILL_FALLING * (1 - last)


def _separated(metrics: Mapping[str, float], config: CircuitBreakerConfig) -> bool:
    """Whether benign hidden states moved by less than `STAYED` of their norm at every target layer.

    Text that is turned below a cosine of 0.5 moves by sin 60° = 0.87 of its norm or more: of rows that are alike on
    both sides one cannot be turned while the other stays.
    """
    return max(metrics[f"eval_distance_layer_{layer}"] for layer in config.target_layers) < STAYED
