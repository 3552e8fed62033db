"""Train one circuit breaker, without Ray.

    python -m cbtrain.train --preset llama-3.1-8b-instruct --beta-kl 0.3 --output-dir outputs/cb
    python -m cbtrain.train --from-decision runs/latest/report/decision.json

Under torchrun it uses every process that torchrun started.
"""

import dataclasses
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cbtrain.config import CircuitBreakerConfig, InputError, cli, get_config
from cbtrain.config.help import Help
from cbtrain.config.saved import config_of_decision, said_by_decision
from cbtrain.model.auto import derived, reasons
from cbtrain.utils.errors import reason
from cbtrain.utils.files import nearest_existing
from cbtrain.utils.metrics_file import read_metrics
from cbtrain.utils.tracking import Mode, open_tracker


@dataclass(kw_only=True)
class TrainSettings:
    """Train one circuit-breaker adapter."""

    preset: str = "tiny"
    """Where the defaults of all other flags come from; `python -m cbtrain.config` lists them."""
    from_decision: Path | None = None
    """Train what a sweep's report/decision.json chose, with the sweep's preset, data and fields. Flags given beside it
    override."""
    despite_verdict: bool = False
    """With --from-decision: train also what is no choice, beta_kl 0 where no weight qualifies, or the setting that is
    best so far in a sweep that has not ended."""
    output_dir: Path = Path("outputs/cb")
    """Directory for config.json, metrics.jsonl, adapter/, checkpoint/ and teacher_cache/."""
    resume: bool = False
    """Continue the run in --output-dir from its newest checkpoint (see --checkpoint-every)."""
    teacher_cache: str = "auto"
    """Where the frozen teacher's states are kept: auto is --output-dir where that pays and fits, off runs the teacher
    at every step, anything else is a directory that runs can share (a sweep's teacher_cache/, for one)."""
    profile: bool = False
    """Write where the time goes to --output-dir/profile.json: seconds of data, forwards, KL, backward, optimizer,
    evaluation, checkpoints and reports."""
    wandb_project: str | None = None
    """Log to this Weights & Biases project. A failure there is one line and never ends the run; --resume continues the
    run there."""
    wandb_mode: Mode = "online"
    """`offline` needs neither login nor network: files go to --output-dir, and `wandb sync` uploads them later."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


HELP = Help(
    groups={
        "What is trained": ("preset", "from_decision", "despite_verdict", "beta_kl", "kl_temperature"),
        "Where it runs": ("teacher_cache",),
        "Output": ("output_dir", "resume", "profile", "wandb_project", "wandb_mode"),
    },
    first=(
        *("preset", "from_decision", "beta_kl", "kl_temperature", "harmful", "benign", "model"),
        *("target_layers", "steps", "batch_size", "lr", "seed", "zero_stage", "gradient_checkpointing"),
        *("output_dir", "resume", "wandb_project"),
    ),
    examples=(
        "python -m cbtrain.train --from-decision runs/latest/report/decision.json",
        "python -m cbtrain.train --preset llama-3.1-8b-instruct --beta-kl 0.3 …",
        "torchrun --nproc-per-node 8 -m cbtrain.train --zero-stage 2 …",
    ),
    metavars={"preset": "NAME", "teacher_cache": "auto|off|DIR", "wandb_project": "NAME"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status."""
    settings = _settings(sys.argv[1:] if argv is None else argv)
    settings.config.validate()
    if not settings.resume and (settings.output_dir / "metrics.jsonl").exists():
        raise InputError(f"{settings.output_dir} already holds a run: --resume to continue it, or another --output-dir")
    _require_writable(settings.output_dir)

    from cbtrain.data.checks import description
    from cbtrain.utils.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.model.checks import prepare
    from cbtrain.model.loading import resolve
    from cbtrain.teacher_cache.plan import plan_cache

    config = resolve(settings.config)
    data, _ = prepare(config)
    cache = plan_cache(settings.teacher_cache, settings.output_dir / "teacher_cache", config, data, runs=1)
    if _first():
        derived_numbers = reasons(config) if settings.preset == "auto" and not settings.from_decision else []
        decided = said_by_decision(settings.from_decision) if settings.from_decision else []
        lines = [*decided, *derived_numbers, *description(data), f"teacher cache: {cache.says}"]
        print("\n".join(lines), flush=True)
    return _train(dataclasses.replace(settings, config=config), cache.directory)


def _settings(argv: Sequence[str]) -> TrainSettings:
    """The settings; a decision's configuration stands in for the preset's."""
    decision = cli.value_of("--from-decision", argv)
    if decision is None:
        return cli.parse(TrainSettings, argv, "python -m cbtrain.train", derived=derived, about=HELP)
    if cli.value_of("--preset", argv) or cli.value_of("--config", argv):
        raise InputError("--preset: --from-decision brings the sweep's own; leave one of them out")
    config = config_of_decision(Path(decision), despite_verdict="--despite-verdict" in argv)
    return cli.parse(TrainSettings, argv, "python -m cbtrain.train", config, derived=derived, about=HELP)


def _train(settings: TrainSettings, teacher_cache: Path | None) -> int:
    """Train with a screen and a tracker beside; the exit status."""
    from cbtrain.training.console import TrainingConsole
    from cbtrain.training.loop import train
    from cbtrain.training.metrics import Metrics
    from cbtrain.training.non_finite import NonFiniteLossError
    from cbtrain.utils.profile import OFF, Profile
    from cbtrain.utils.stopping import Interrupted

    config, output_dir = settings.config, settings.output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    tracker = open_tracker(
        settings.wandb_project if _first() else None,
        settings.wandb_mode,
        directory=output_dir,
        name=output_dir.resolve().name,
        config=dataclasses.asdict(config),
        job_type="train",
        tags=["from-decision" if settings.from_decision else settings.preset],
        goes_on=settings.resume,
    )
    for earlier in read_metrics(output_dir / "metrics.jsonl", skip_damaged=True):  # what W&B has of them it keeps
        tracker.log(earlier, int(earlier["step"]))
    asked = threading.Event()
    with tracker, TrainingConsole(config.steps, shown=_first()) as console:

        def ask() -> None:
            asked.set()
            console.say(cli.WILL_STOP)

        def report(metrics: Metrics) -> None:
            console.report(metrics)
            tracker.log(metrics, int(metrics["step"]))

        try:
            with cli.asked_first(ask):
                metrics = train(
                    config,
                    output_dir,
                    report,
                    resume=settings.resume,
                    teacher_cache=teacher_cache,
                    progress=console.advance,
                    profile=Profile() if settings.profile else OFF,
                    stop=asked.is_set,
                )
        except Interrupted as stop:
            if _first():
                console.say(f"{stop}: the same command with --resume goes on from there")
            raise KeyboardInterrupt from None
        except NonFiniteLossError as error:
            print(f"error: {error}", file=sys.stderr)
            tracker.close(1)
            return 1
        tracker.summary(metrics)
    if _first():
        print(f"trained {metrics['step']} steps in {metrics['train_s']:.1f} s · adapter {output_dir / 'adapter'}")
        print(f"next  python -m cbtrain.evaluate --adapter {output_dir / 'adapter'}")
    return 0


def _require_writable(output_dir: Path) -> None:
    """See that a file can be written there, and leave nothing behind."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(output_dir)):
            pass
    except OSError as error:
        raise InputError(f"--output-dir {output_dir}: {reason(error)}") from error


def _first() -> bool:
    """Whether this process speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(cli.run(main))
