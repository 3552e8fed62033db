"""A sweep's calibration: runs before its first trial, on what a trial runs on, that are no trials."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from analysis.formatting import count
from cbtrain.config import InputError
from sweeps.execution.context import TrialContext
from sweeps.execution.training import run_once
from sweeps.reporting.console import wrapped
from sweeps.reporting.screen import SCREEN
from sweeps.runtime.failures import root_cause
from sweeps.runtime.processes import Processes

if TYPE_CHECKING:
    from cbtrain.calibration.outcome import Calibration

STARTUP_S = 15.0
"""Of Ray's processes and their imports, once a sweep."""


def calibrate_before(
    context: TrialContext, max_steps: int, fixed: Collection[str], processes: Processes | None
) -> "Calibration":
    """Climb the ladder and write `calibration.json` into the run directory.

    Raises:
        InputError: as `cbtrain.calibration.ladder.calibrate`, or its workers were lost.
    """
    work = functools.partial(_calibrate, context, max_steps, fixed)
    try:
        found: Calibration = run_once(work, context, processes, "calibration", _say)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"calibration: {root_cause(error)}; see logs/ in {context.run_dir}") from error
    if processes is None:  # workers that Train starts do not report as they go
        for run in found.runs:
            _say(run.line())
    found.write(context.run_dir / "calibration.json")
    return found


def _calibrate(
    context: TrialContext, max_steps: int, fixed: Collection[str], say: Callable[[str], None]
) -> "Calibration":
    from cbtrain.calibration.ladder import calibrate

    return calibrate(
        context.config,
        context.run_dir / "calibration",
        max_steps=max_steps,
        fixed=fixed,
        teacher_cache=context.teacher_cache,
        say=say,
    )


def _say(line: str) -> None:
    SCREEN.say(*wrapped(f"calibrate {line}"))


def summary(found: "Calibration") -> dict[str, Any]:
    """What sweep.json keeps of it."""
    return {
        "converged": found.converged,
        "reason": found.reason,
        "settings": found.settings,
        "runs": len(found.runs),
        "steps_spent": found.steps_spent,
        "max_steps": found.max_steps,
        "wall_s": found.wall_s,
    }


def told(found: "Calibration", trials: int, at_a_time: int) -> list[str]:
    """What came of it, and how long the sweep will take by what its runs took.

    Args:
        at_a_time: trials that run on as much as the runs had each; 1 where they share it.
    """
    numbers = " · ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in found.settings.items())
    spent = f"{count(len(found.runs), 'run')}, {count(found.steps_spent, 'step')}, {found.wall_s / 60:.1f} min"
    lines = wrapped(f"calibrate {found.reason} {numbers} ({spent}, apart from the trials)")
    if found.converged:
        minutes = predicted_s(found, trials, at_a_time) / 60
        lines += wrapped(f"time      {count(trials, 'trial')} will take about {minutes:.0f} min")
    return lines


def spent(calibration: Mapping[str, Any]) -> list[str]:
    """What the summary says of a calibration that sweep.json keeps."""
    runs, steps = count(calibration["runs"], "run"), count(calibration["steps_spent"], "step")
    return wrapped(f"calibrate {runs}, {steps}, {calibration['wall_s'] / 60:.1f} min before the trials, not among them")


def predicted_s(found: "Calibration", trials: int, at_a_time: int) -> float:
    """Seconds that the sweep's trials will take, by what a step and an evaluation took in the calibration's runs."""
    config, steps = found.config, sum(run.steps for run in found.runs)
    evaluated = sum(len(run.curve) for run in found.runs)
    a_step = sum(run.train_s for run in found.runs) / max(1, steps)
    an_evaluation = sum(run.eval_s for run in found.runs) / max(1, evaluated)
    evaluations = -(-config.steps // config.eval_every) if config.eval_every else 1
    return STARTUP_S + trials * (config.steps * a_step + evaluations * an_evaluation) / at_a_time


def with_recipe(context: TrialContext, found: "Calibration", given: Collection[str]) -> TrialContext:
    """The trials' context with what was found.

    Where it has more steps, checkpoints lie as much further apart, unless `checkpoint_every` is among the fields given.
    """
    recipe: dict[str, Any] = {name: value for name, value in found.settings.items() if name != "steps"}
    steps, before = int(found.settings["steps"]), context.config.steps
    if "checkpoint_every" not in given:
        recipe["checkpoint_every"] = -(-context.config.checkpoint_every * steps // before)
    return dataclasses.replace(context, config=dataclasses.replace(context.config, steps=steps, **recipe))
