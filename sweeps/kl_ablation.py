"""Sweep beta_kl and kl_temperature under the constraint that rerouting must not regress.

    python sweeps/kl_ablation.py --num-samples 20
    python sweeps/kl_ablation.py --model DIR --harmful harmful.jsonl --benign benign.jsonl

On a laptop it starts Ray for itself and ends it; where `RAY_ADDRESS` is set (as `ray job submit` does) it uses that
cluster.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path[0] = str(ROOT)  # started as a script, which puts sweeps/ there

from cbtrain import cli
from cbtrain.config import CircuitBreakerConfig, InputError, flag, get_config

if TYPE_CHECKING:
    from cbtrain.data import CircuitBreakerData
    from cbtrain.recall import CachePlan
    from sweeps.budget import PlanSettings
    from sweeps.cache import CacheReport
    from sweeps.run_directory import RunDirectory
    from sweeps.search import PlanSearcher
    from sweeps.trial import TrialContext

SEARCHED = ("beta_kl", "kl_temperature")
EXIT_STATUS = {"baseline_never_rerouted": 3, "baseline_failed": 3}


@dataclass(kw_only=True)
class SweepSettings:
    """Sweep beta_kl and kl_temperature of a circuit breaker, with a total of --num-samples trials."""

    preset: str = "tiny"
    """Where the defaults of the training flags come from (tiny, llama-3.1-8b-instruct, llama-4-scout)."""
    num_samples: int = 20
    """Trials in all: baseline, ablation, search and confirmation."""
    run_dir: Path | None = None
    """Directory for everything the sweep writes; None is runs/kl_ablation-TIME."""
    baseline_seeds: int | None = None
    """Seeds of the beta_kl = 0 baseline; None is a fifth of the trials, at least 3, at most 8."""
    reroute_tolerance: float = 0.05
    """Share of the baseline's rerouting that a setting may lose."""
    confidence: float = 0.95
    """Probability of keeping that limit which a recommended setting must reach."""
    max_concurrent: int | None = None
    """Trials at a time; None is what the machine holds, at most 4."""
    workers_per_trial: int = 1
    """Worker processes a trial; more than 1, or a GPU, gives each trial workers of its own."""
    gpus_per_worker: float | None = None
    """GPUs a worker; None is 1 where there are GPUs, else 0."""
    teacher_cache: str = "auto"
    """Where the frozen teacher's states are kept for all trials: auto is the run directory where that pays and fits,
    off runs the teacher at every step, anything else is a directory that sweeps can share."""
    dry_run: bool = False
    """Check everything, print the plan and what the teacher cache would take, and start nothing."""
    config: CircuitBreakerConfig = field(default_factory=lambda: get_config("tiny"))


def main() -> int:
    """Run the command; its exit status."""
    settings = cli.parse(SweepSettings, sys.argv[1:], "python sweeps/kl_ablation.py")
    overrides = _overrides(settings)

    from sweeps.budget import PlanSettings, allocate
    from sweeps.run_directory import RunDirectory

    plan_settings = PlanSettings(
        num_samples=settings.num_samples,
        seed=settings.config.seed,
        baseline_seeds=settings.baseline_seeds,
        reroute_tolerance=settings.reroute_tolerance,
        confidence=settings.confidence,
    )
    budget = allocate(plan_settings)
    settings.config.validate()
    if settings.run_dir == Path():
        raise InputError("--run-dir: name a directory")
    run = RunDirectory(settings.run_dir or Path("runs") / time.strftime("kl_ablation-%Y%m%d-%H%M%S"))
    run.refuse_if_taken()
    _check_workers(settings)
    config, data = _read_inputs(settings)

    from cbtrain.recall import plan_cache
    from sweeps.progress import plan_lines

    cache = plan_cache(settings.teacher_cache, run.path / "teacher_cache", config, data, budget.total)
    print("\n".join(plan_lines(plan_settings, budget, cache.says, run.shown)), flush=True)
    if settings.dry_run:
        return 0

    from sweeps.machine import place, started_ray

    with started_ray() as resources:
        cli.catch_sigterm()
        workers, concurrency = place(
            resources,
            workers=settings.workers_per_trial,
            gpus_per_worker=settings.gpus_per_worker,
            max_concurrent=settings.max_concurrent,
        )
        run.create(
            {
                "status": "running",
                "preset": settings.preset,
                "settings": dataclasses.asdict(plan_settings),
                "plan": dataclasses.asdict(budget),
                "tolerance": None,
                "concurrency": concurrency,
                "workers": dataclasses.asdict(workers),
                "teacher_cache": cache.directory or cache.says,
                "config": dataclasses.asdict(config),
                "config_overrides": overrides,
            }
        )
        _log_to(run.path / "logs" / "driver.log")
        from sweeps.trial import TrialContext

        print(f"          {concurrency} at a time\n", flush=True)
        context = TrialContext(config=config, run_dir=run.path, workers=workers)
        return _sweep(run, plan_settings, context, concurrency, cache)


def _overrides(settings: SweepSettings) -> dict[str, object]:
    """The training fields given on the command line that differ from the preset."""
    preset = dataclasses.asdict(get_config(settings.preset))
    given = dataclasses.asdict(settings.config)
    overrides = {name: value for name, value in given.items() if value != preset[name]}
    for name in SEARCHED:
        if name in overrides:
            raise InputError(f"{flag(name)} {overrides[name]}: the sweep searches it; leave the flag out")
    return overrides


def _check_workers(settings: SweepSettings) -> None:
    for name in ("workers_per_trial", "max_concurrent"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise InputError(f"{flag(name)} {value}: must be 1 or more")


def _read_inputs(settings: SweepSettings) -> "tuple[CircuitBreakerConfig, CircuitBreakerData]":
    """Read the model's structure and the data, so that what is wrong with them is said now, and print what was read.

    Returns:
        The configuration of every trial, with paths that hold wherever its process starts, and the rows.
    """
    from cbtrain.environment import quiet_libraries

    quiet_libraries()
    from cbtrain.batches import check_batch
    from cbtrain.loop import prepare
    from cbtrain.model import check_fit, resolve

    config = resolve(settings.config)
    check_batch(config, settings.workers_per_trial)
    data, _ = prepare(config)
    print(f"KL ablation · preset {settings.preset} · model {settings.config.model} ({check_fit(config)} layers)")
    first, *rest = data.describe()
    print("\n".join([f"data      {first}", *(f"          {line}" for line in rest)]), flush=True)
    return _with_absolute_paths(config), data


def _with_absolute_paths(config: CircuitBreakerConfig) -> CircuitBreakerConfig:
    """The same files wherever a trial's process starts; names that are no directory here are the hub's."""

    def absolute(name: str) -> str:
        return str(Path(name).absolute()) if Path(name).is_dir() else name

    return dataclasses.replace(
        config,
        model=absolute(config.model),
        tokenizer=config.tokenizer and absolute(config.tokenizer),
        harmful=tuple(str(Path(file).absolute()) for file in config.harmful),
        benign=tuple(str(Path(file).absolute()) for file in config.benign),
    )


def _sweep(
    run: "RunDirectory", settings: "PlanSettings", context: "TrialContext", concurrency: int, cache: "CachePlan"
) -> int:
    """Run the plan to its end; the exit status."""
    import pandas as pd
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    from analysis.decide import decide
    from sweeps.plan import SweepPlan
    from sweeps.progress import EventLines, summary_lines
    from sweeps.search import PlanSearcher

    plan = SweepPlan(settings, JournalStorage(JournalFileBackend(str(run.path / "study.log"))))
    started = time.monotonic()
    try:
        context, spared = _with_cache(context, cache, run)
        events = EventLines(plan)

        def on_change() -> None:
            rows = plan.rows()
            run.write_trials(rows)
            if plan.tolerance is not None and run.record["tolerance"] is None:
                run.update(tolerance=plan.tolerance)
            events.update(rows)

        _tune(PlanSearcher(plan, on_change), context, concurrency)
    except BaseException as stop:
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            run.update(status="failed" if isinstance(stop, Exception) else "interrupted")
        if isinstance(stop, KeyboardInterrupt):
            print(f"\nthe trials that ended are in {run.shown}/trials.csv", file=sys.stderr)
        raise
    wall_s = time.monotonic() - started
    run.update(status="finished", wall_s=wall_s)
    rows = plan.rows()
    decision = decide(pd.DataFrame(rows), reroute_tolerance=settings.reroute_tolerance, confidence=settings.confidence)
    print("\n".join(summary_lines(rows, decision, wall_s, concurrency, run.shown, spared)))
    return EXIT_STATUS.get(decision.verdict, 0)


def _with_cache(
    context: "TrialContext", plan: "CachePlan", run: "RunDirectory"
) -> tuple["TrialContext", "CacheReport | None"]:
    """The trials' context with a filled cache; without one, and a line that says why, where it cannot be filled."""
    if plan.directory is None:
        return context, None
    from cbtrain.recall import LIVE, CacheUnavailableError
    from sweeps.cache import fill_cache
    from sweeps.progress import wrapped

    try:
        report = fill_cache(plan, context)
    except CacheUnavailableError as error:
        print("\n".join(wrapped(f"cache     off, {LIVE}: {error}")) + "\n", flush=True)
        run.update(teacher_cache=f"off: {error}")
        return context, None
    run.update(teacher_cache={"directory": plan.directory, **dataclasses.asdict(report)})
    return dataclasses.replace(context, teacher_cache=plan.directory), report


def _tune(searcher: "PlanSearcher", context: "TrialContext", concurrency: int) -> None:
    """Run the searcher's trials on Ray Tune."""
    from ray import tune

    from sweeps.trial import run_trial

    trainable = tune.with_parameters(run_trial, context=context)
    tuner = tune.Tuner(
        tune.with_resources(trainable, context.workers.tune_resources()),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=searcher.plan.settings.num_samples,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(context.run_dir / "ray"), verbose=0),
    )
    tuner.fit()
    if searcher.failure is not None:
        raise searcher.failure


def _log_to(path: Path) -> None:
    """Send what libraries log or warn of to a file, off the screen."""
    logging.captureWarnings(True)
    logging.basicConfig(filename=path, level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True)


if __name__ == "__main__":
    sys.exit(cli.run(main))
