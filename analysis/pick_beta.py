"""Which beta_kl to ship, from a finished (or running) sweep, and why.

    python analysis/pick_beta.py [RUN_DIR] [--reroute-tolerance X] [--confidence X]

Writes `RUN_DIR/report/` (report.html, report.md, decision.json, figures/). Exit codes: 0 a setting is recommended,
3 none is, 4 the sweep has not ended, 2 bad input, 130 interrupted.
"""

import dataclasses
import os
import sys
import tempfile
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import tyro

if __name__ == "__main__":
    # Before NumPy is there: on a busy machine threads wait for each other's share of these small matrices.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from analysis.behaviour.judge import BehaviourLimits
from analysis.behaviour.measured import load_behaviour
from analysis.decide import decide_with_model
from analysis.decision import Decision
from analysis.report import report, wording
from analysis.report.commands import Commands, commands_after, folded
from analysis.report.completions import load_completions
from analysis.report.state import state_of
from analysis.trials import load_curves, load_settings, load_trials
from cbtrain.config import InputError, cli, flag, nearest
from cbtrain.utils.errors import reason

_WIDTH = 80


def _number(words: list[str]) -> float:
    try:
        return float(words[0])
    except ValueError:
        raise ValueError(f"invalid float value: {words[0]!r}") from None


_Share = Annotated[
    float | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="X",
        instance_from_str=_number,
        is_instance=lambda _: True,
        str_from_instance=lambda x: [str(x)],
    ),
]
"""A number on the command line, where None, which no flag gives, is the sweep's own."""


@dataclass(frozen=True)
class PickSettings:
    """Which beta_kl to ship, from a finished (or running) sweep, and why."""

    run_dir: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[RUN_DIR]")] = "runs/latest"
    """Run directory of a sweep."""
    reroute_tolerance: _Share = None
    """Share of the baseline's rerouting that may be lost, 0 to 1; by default the sweep's."""
    confidence: _Share = None
    """Probability of keeping that limit, 0.5 to 1; by default the sweep's."""
    completions: bool = True
    """Show on the page some of what the models wrote, harmful text folded; --no-completions leaves it out."""
    so_far: bool = False
    """Give the command that trains the best setting so far, where the sweep has not ended."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    try:
        settings = _settings(sys.argv[1:] if argv is None else argv)
        run_dir = Path(settings.run_dir)
        decision, commands = write_report(
            run_dir,
            settings.reroute_tolerance,
            settings.confidence,
            train_so_far=settings.so_far,
            completions=settings.completions,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.filename}: {reason(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(_summary(decision, named_itself(run_dir), commands), flush=True)
    if decision.so_far:
        return 4
    return 0 if decision.verdict == "choose" else 3


def _settings(argv: Sequence[str]) -> PickSettings:
    settings, unknown = cli.read(PickSettings(), argv, "pick_beta.py")
    if unknown:
        known = [flag(field.name) for field in fields(settings) if field.name != "run_dir"]
        mend = nearest(unknown[0].split("=")[0], known) or f"; one of {', '.join(known)}"
        raise InputError(f"{unknown[0]}: no such argument{mend}")
    return settings


def write_report(
    run_dir: str | Path,
    reroute_tolerance: float | None = None,
    confidence: float | None = None,
    *,
    train_so_far: bool = False,
    completions: bool = True,
) -> tuple[Decision, Commands]:
    """Decide, and write `run_dir/report/`: all texts are made before the first file changes, decision.json is last.

    Args:
        run_dir: a sweep's run directory.
        reroute_tolerance: share of the baseline's rerouting that may be lost; None is the sweep's own.
        confidence: probability that is asked for; None is the sweep's own.
        train_so_far: give the command that trains a choice also where the sweep has not ended.
        completions: show on the page some of what the models wrote.

    Returns:
        The decision, and the commands to run next.

    Raises:
        InputError: the run directory cannot be read, or a value is out of its range.
        OSError: the report cannot be written.
    """
    sweep = decided(Path(run_dir), reroute_tolerance, confidence, train_so_far=train_so_far, completions=completions)
    _write_all(Path(run_dir) / "report", report.render(sweep))
    return sweep.decision, sweep.commands


def decided(
    run_dir: Path,
    reroute_tolerance: float | None = None,
    confidence: float | None = None,
    *,
    train_so_far: bool = False,
    completions: bool = True,
) -> report.Sweep:
    """The run directory read and decided, nothing written; arguments and errors are those of `write_report`."""
    sweep = load_settings(run_dir)
    calibration = sweep["calibration"]
    if calibration and not calibration["converged"] and not (run_dir / "trials.csv").is_file():
        raise InputError(f"{run_dir}: its calibration ended the sweep before a trial: {calibration['reason']}")
    trials = load_trials(run_dir)
    curves, behaviour = load_curves(run_dir), load_behaviour(run_dir, trials)
    settings = sweep["settings"]
    tolerance = settings["reroute_tolerance"] if reroute_tolerance is None else reroute_tolerance
    confidence = settings["confidence"] if confidence is None else confidence
    if not 0 < tolerance < 1:
        raise InputError(f"--reroute-tolerance {tolerance}: must lie between 0 and 1")
    if not 0.5 < confidence < 1:
        raise InputError(f"--confidence {confidence}: must lie between 0.5 and 1")
    decision, model = decide_with_model(
        trials,
        reroute_tolerance=tolerance,
        confidence=confidence,
        searched=sweep["searched"],
        trained=sweep["config"],
        behaviour=behaviour,
        limits=BehaviourLimits.of(sweep["flags"]),
    )
    state = state_of(sweep, trials)
    decision = dataclasses.replace(decision, so_far=state.so_far)
    named = named_itself(run_dir)
    sweep["run_dir"] = str(named)
    runs = state.kind == "running"
    commands = commands_after(decision, sweep, trials, named, runs=runs, train_so_far=train_so_far)
    answers = load_completions(run_dir, behaviour, decision) if completions else []
    return report.Sweep(decision, model, sweep, trials, curves, behaviour, answers, commands, state)


def named_itself(run_dir: Path) -> Path:
    """The run directory by its own name where it was named by a link such as `runs/latest`, which moves on."""
    if not run_dir.is_symlink():
        return run_dir
    itself = run_dir.resolve()
    return itself.relative_to(Path.cwd()) if itself.is_relative_to(Path.cwd()) else itself


def _write_all(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """Write every file beside its place, then rename them all in order; no reader sees half a file."""
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".writing-") as staging:
        for name, text in files.items():
            staged = Path(staging, name)
            staged.parent.mkdir(parents=True, exist_ok=True)
            staged.write_bytes(text if isinstance(text, bytes) else text.encode(errors="replace"))
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
        for name in files:
            os.replace(Path(staging, name), directory / name)


def _summary(decision: Decision, run_dir: Path, commands: Commands) -> str:
    """What the terminal shows: at most 80 columns, the last line is the next command."""
    lines = textwrap.wrap(wording.headline(decision), _WIDTH) + textwrap.wrap(wording.explanation(decision), _WIDTH)
    for suspect in wording.suspect_lines(decision):
        lines += textwrap.wrap(f"suspect: {suspect}", _WIDTH)
    page = run_dir / "report" / "report.html"
    for warning in decision.warnings:
        lines += textwrap.wrap(f"warning: {warning}", _WIDTH)
    if not commands.trains:
        return "\n".join([*lines, folded(commands.next), "", f"report  {page}"])
    lines.append(f"  {'rule of thumb':<38}  {'says':<7}  on")
    for rule in decision.rules_of_thumb:
        lines.append(f"  {rule.rule:<38}  {report.SAYS[rule.fired]:<7}  {rule.evidence}")
        lines += [f"    but {rule.instead}"] if rule.instead else []
    lines += [f"report  {page}", *([_labelled("wider", commands.wider)] if commands.wider else [])]
    return "\n".join([*lines, _labelled("train", commands.next)])


def _labelled(label: str, command: str) -> str:
    """A command beside its label, over as many lines as it takes."""
    return f"{label:<8}" + folded(command, _WIDTH - 10).replace("\n", "\n" + " " * 8)


if __name__ == "__main__":
    sys.exit(cli.run(main))
