"""Find learning rate, retain scale and steps at which rerouting converges, before a sweep is paid for.

    python -m cbtrain.calibrate --model DIR --harmful harmful.jsonl --benign benign.jsonl
    python sweeps/kl_ablation.py --calibration outputs/calibration/calibration.json …

Exit status 3 where nothing converges within the steps allowed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from cbtrain.config import CircuitBreakerConfig, InputError, cli, get_config
from cbtrain.config.help import Help
from cbtrain.config.validation import check_fields
from cbtrain.model.auto import derived, reasons
from cbtrain.utils.errors import reason

EXIT_NONE = 3
DEFAULT_TRIALS = 20
"""Trials of the sweep that it stands before, where nothing else is said."""
RUNS = "calibration-runs"
"""Directory in the output directory; what it holds is replaced, so no user's own is called that."""
FIXABLE = ("lr", "retain_scale", "steps")


@dataclass(kw_only=True)
class CalibrateSettings:
    """Find a recipe whose rerouting converges at three seeds, by a ladder of short runs without KL."""

    preset: str = "tiny"
    """Where the ladder starts; auto, the default where --model is given, derives it from the model."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Optimizer updates of all runs together; by default a fifth of a sweep of 20 trials. What of --lr, --retain-scale
    and --steps is given as a flag stays as it is."""
    output_dir: Path = Path("outputs/calibration")
    """Directory for calibration.json and the runs; what an earlier calibration left there is replaced."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


HELP = Help(
    groups={"What is looked for": ("preset", "max_steps"), "Output": ("output_dir",)},
    first=(
        *("preset", "max_steps", "harmful", "benign", "mask_policy", "model", "target_layers", "retain_scale"),
        *("steps", "batch_size", "lr", "gradient_checkpointing", "output_dir"),
    ),
    examples=("python -m cbtrain.calibrate --model DIR --harmful h.jsonl --benign b.jsonl",),
    metavars={"preset": "NAME"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    settings = cli.parse(CalibrateSettings, argv, "python -m cbtrain.calibrate", derived=derived, about=HELP)
    check_fields(settings, CalibrateSettings)
    settings.config.validate()
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {settings.output_dir}: {reason(error)}") from error

    from cbtrain.data.checks import description
    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.calibration.ladder import calibrate
    from cbtrain.calibration.outcome import steps_allowed
    from cbtrain.model.checks import prepare
    from cbtrain.model.loading import resolve

    config = resolve(settings.config)
    data, _ = prepare(config)
    derived_numbers = reasons(config) if settings.preset == "auto" else []
    print("\n".join([*derived_numbers, *description(data)]), flush=True)
    max_steps = settings.max_steps or steps_allowed(DEFAULT_TRIALS, config.steps)
    print(f"calibrate at most {max_steps} steps of {config.batch_size} + {config.batch_size} rows", flush=True)
    fixed = [name for name in FIXABLE if cli.value_of("--" + name.replace("_", "-"), argv) is not None]
    found = calibrate(
        config, settings.output_dir / RUNS, max_steps=max_steps, fixed=fixed, say=lambda line: print(line, flush=True)
    )
    found.write(settings.output_dir / "calibration.json")
    print(found.reason)
    if not found.converged:
        return EXIT_NONE
    numbers = " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in found.settings.items())
    print(f"recipe  {numbers}  ({found.steps_spent} steps, {found.wall_s:.0f} s)")
    print(f"next    python sweeps/kl_ablation.py --calibration {settings.output_dir / 'calibration.json'} …")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
