"""Train one circuit breaker, without Ray.

    python -m cbtrain.train --preset llama-3.1-8b-instruct --beta-kl 0.3 --output-dir outputs/cb

Under torchrun it uses every process that torchrun started.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from cbtrain import cli
from cbtrain.config import CircuitBreakerConfig, InputError, get_config


@dataclass(kw_only=True)
class TrainSettings:
    """Train one circuit-breaker adapter."""

    preset: str = "tiny"
    """Where the defaults of all other flags come from (tiny, llama-3.1-8b-instruct, llama-4-scout)."""
    output_dir: Path = Path("outputs/cb")
    """Directory for config.json, metrics.jsonl, adapter/, checkpoint/ and teacher_cache/."""
    resume: bool = False
    """Continue the run in --output-dir from its newest checkpoint (see --checkpoint-every)."""
    teacher_cache: str = "auto"
    """Where the frozen teacher's states are kept: auto is --output-dir where that pays and fits, off runs the teacher
    at every step, anything else is a directory that runs can share (a sweep's teacher_cache/, for one)."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


def main() -> int:
    """Run the command; its exit status."""
    settings = cli.parse(TrainSettings, sys.argv[1:], "python -m cbtrain.train")
    settings.config.validate()
    if not settings.resume and (settings.output_dir / "metrics.jsonl").exists():
        raise InputError(f"{settings.output_dir} already holds a run: --resume to continue it, or another --output-dir")
    try:
        settings.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output-dir {settings.output_dir}: {error.strerror}") from error

    from cbtrain.environment import quiet_libraries

    quiet_libraries()
    from cbtrain import distributed
    from cbtrain.loop import prepare, train
    from cbtrain.metrics import NonFiniteLossError, console_line
    from cbtrain.model import resolve
    from cbtrain.recall import plan_cache

    config = resolve(settings.config)
    data, _ = prepare(config)
    cache = plan_cache(settings.teacher_cache, settings.output_dir / "teacher_cache", config, data, runs=1)
    print("\n".join([*data.describe(), f"teacher cache: {cache.says}"]), flush=True)

    def report(metrics: dict[str, float]) -> None:
        if distributed.rank() == 0 and (metrics["step"] % 10 == 0 or "eval_loss_reroute" in metrics):
            print(console_line(metrics), flush=True)

    try:
        metrics = train(config, settings.output_dir, report, resume=settings.resume, teacher_cache=cache.directory)
    except NonFiniteLossError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"trained {metrics['step']} steps in {metrics['train_s']:.1f} s · adapter {settings.output_dir / 'adapter'}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run(main))
