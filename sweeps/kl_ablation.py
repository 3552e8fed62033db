"""Sweep beta_kl and kl_temperature under the constraint that rerouting must not regress.

    python sweeps/kl_ablation.py --num-samples 20
    python sweeps/kl_ablation.py --model DIR --harmful harmful.jsonl --benign benign.jsonl
    python sweeps/kl_ablation.py --resume runs/latest

On a laptop it starts Ray for itself and ends it; where `RAY_ADDRESS` is set (as `ray job submit` does) it uses that
cluster.
"""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    sys.path[0] = str(ROOT)  # started as a script, which puts sweeps/ there

from sweeps.reporting.screen import SCREEN

if __name__ == "__main__":
    SCREEN.start(sys.argv[1:])  # before the imports that take seconds

from analysis.behaviour.judge import BehaviourLimits
from cbtrain.config import CircuitBreakerConfig, InputError, cli
from cbtrain.config.presets import UNMEASURED
from cbtrain.config.saved import RECIPE, with_calibration
from cbtrain.evaluation.judge.judge import load_classifier
from cbtrain.model.auto import derived
from cbtrain.utils.environment import importing
from sweeps.settings import HELP, SweepSettings, check_counts, overrides_of_preset, refuse_searched

if TYPE_CHECKING:
    from cbtrain.teacher_cache.plan import CachePlan
    from sweeps.execution.driver import SweepDriver
    from sweeps.plan.budget import PlanSettings
    from sweeps.storage.export import Destination
    from sweeps.storage.resume import Found
    from sweeps.storage.run_directory import RunDirectory

CHECKPOINTS = 4
"""A trial that is killed repeats at most this fraction of its steps; each checkpoint costs the embedded default 1 %."""


@dataclass(frozen=True)
class Job:
    """A sweep to begin or to continue."""

    run: "RunDirectory"
    settings: SweepSettings
    plan: "PlanSettings"
    found: "Found | None" = None
    """What a sweep that is continued has already."""


def main() -> int:
    """Run the command; its exit status."""
    try:
        return _commanded(sys.argv[1:])
    finally:
        SCREEN.end()


def _commanded(argv: Sequence[str]) -> int:
    settings = cli.parse(SweepSettings, argv, "python sweeps/kl_ablation.py", derived=derived, about=HELP)
    SCREEN.quiet = settings.quiet
    if settings.resume is None:
        job = _new(settings, argv)
        with contextlib.nullcontext() if settings.dry_run else job.run.locked(or_next=settings.run_dir is None):
            return _run(job)

    from sweeps.storage.run_directory import RunDirectory
    from sweeps.storage.shared_path import run_path

    run = RunDirectory(run_path(settings.storage_path, settings.resume))
    run.read()
    with run.locked():
        return _run(_continued(run, settings, argv))


def _new(settings: SweepSettings, argv: Sequence[str]) -> Job:
    """A sweep that begins, with its settings complete."""
    from sweeps.plan.budget import PlanSettings, allocate
    from sweeps.storage.resume import flags_to_keep, given_flags
    from sweeps.storage.run_directory import RunDirectory
    from sweeps.storage.shared_path import run_path

    shared = {name.name for name in dataclasses.fields(PlanSettings)} & vars(settings).keys()
    plan = PlanSettings(**{name: getattr(settings, name) for name in shared}, seed=settings.config.seed)
    plan = dataclasses.replace(plan, baseline_seeds=allocate(plan).baseline)
    given = given_flags(argv)
    refuse_searched(settings, given)
    if settings.retry_failed:
        raise InputError("--retry-failed: goes with --resume RUN_DIR, of the sweep whose trials failed")
    settings.config.validate()
    if settings.calibration is not None:
        if settings.calibrate:
            raise InputError("--calibrate: --calibration brings a recipe; leave one of them out")
        settings.config = with_calibration(settings.config, settings.calibration, given)
    elif settings.preset in UNMEASURED and "calibrate" not in given:
        settings.calibrate = True
    overrides = overrides_of_preset(settings)
    overrides |= {name: getattr(settings.config, name) for name in RECIPE if name in given}
    if "checkpoint_every" not in given:
        settings.config.checkpoint_every = -(-settings.config.steps // CHECKPOINTS)
    if settings.run_dir == Path():
        raise InputError("--run-dir: name a directory")
    default = Path("" if settings.storage_path else "runs") / time.strftime("kl_ablation-%Y%m%d-%H%M%S")
    run = RunDirectory(run_path(settings.storage_path, settings.run_dir or default))
    run.refuse_if_taken() if settings.run_dir else run.refuse_if_unwritable()
    run.record = {"preset": settings.preset, "config_overrides": overrides, "flags": flags_to_keep(settings)}
    return Job(run, settings, plan)


def _continued(run: "RunDirectory", settings: SweepSettings, argv: Sequence[str]) -> Job:
    """The sweep in a run directory, to go on with; the caller holds its lock."""
    from sweeps.storage.resume import find_trials, mend_journal, recorded

    run.read()
    settings, plan = recorded(run, settings, argv)
    found = find_trials(run, plan, retry_failed=settings.retry_failed)
    if not settings.dry_run:
        mend_journal(run)
    return Job(run, settings, plan, found)


def _run(job: Job) -> int:
    """Check everything, say what will be done, and do it; the exit status."""
    from sweeps.plan.budget import allocate
    from sweeps.plan.early_stopping import require_stoppable
    from sweeps.storage.inputs import predicted_memory, read_inputs

    budget = allocate(job.plan)
    job.settings.config.validate()
    check_counts(job.settings)
    if job.settings.early_stop:
        require_stoppable(job.settings.config, budget.baseline)
    destination = _checked_outlets(job)
    load_classifier(job.settings.judge)
    config, data = read_inputs(job.settings.config, job.settings.preset, job.settings.workers_per_trial, job.run.record)

    if job.found is None:
        job.run.record |= {"tokens": data.fingerprint, "rows": data.row_counts}

    from cbtrain.teacher_cache.plan import plan_cache
    from sweeps.reporting.console import wrapped
    from sweeps.reporting.plan_lines import behaviour_line, calibration_line, plan_lines
    from sweeps.storage.resume import resumed_lines

    cache = plan_cache(job.settings.teacher_cache, job.run.path / "teacher_cache", config, data, budget.total)
    lines = plan_lines(job.plan, budget, cache.says, job.run.shown, job.settings.early_stop)
    if job.settings.calibrate and not job.run.record.get("calibration"):
        lines += wrapped(calibration_line(budget.total, config.steps))
    if job.settings.behaviour_prompts:
        lines += wrapped(behaviour_line(job.settings.behaviour_prompts))
    if job.found is not None:
        lines += resumed_lines(job.run, job.found, config, job.settings.workers_per_trial, budget.total)
    if job.settings.dry_run:
        needed = predicted_memory(config, data, job.settings.workers_per_trial, job.settings.gpus_per_worker)
        SCREEN.conclude(*lines, *wrapped(f"memory    {needed}"))
        return 0
    SCREEN.say(*lines)
    status = _start(job, config, cache)
    return destination.deliver(job.run, status) if destination else status


def _checked_outlets(job: Job) -> "Destination | None":
    """See that results can go where they shall; the place to copy them to, if there is one."""
    settings = job.settings
    if settings.wandb_project is not None:
        from sweeps.reporting.wandb import require_login

        require_login(settings.wandb_mode)
    if settings.copy_to is None:
        return None
    from sweeps.storage.export import Destination

    destination = Destination(settings.copy_to, job.run.path.name)
    if not settings.dry_run:
        destination.check(new=job.found is None)
    return destination


def _start(job: Job, config: CircuitBreakerConfig, cache: "CachePlan") -> int:
    """Run the sweep to its end, where anything is left to run, with W&B beside it; the exit status."""
    from sweeps.reporting.wandb import followed
    from sweeps.storage.resume import flags_to_keep, wait_for_leftovers

    run, settings, found = job.run, job.settings, job.found
    with contextlib.ExitStack() as stack:
        if found is not None and not found.done:
            wait_for_leftovers(run, [spec.trial_id for spec in found.interrupted])
        stack.enter_context(followed(run.path, run.shown, settings.wandb_project, settings.wandb_mode))
        refused = not run.record.get("calibration", {"converged": True})["converged"]
        if found is not None and (found.done or refused):
            status = _driver(job, run.record.get("concurrency", 1)).concluded()
            if status is not None:
                run.update(flags=flags_to_keep(settings))
                return status
        status = _on_ray(job, config, cache)
        if settings.wandb_project is not None:
            SCREEN.begin("wandb", "logs what is left")
        return status


def _on_ray(job: Job, config: CircuitBreakerConfig, cache: "CachePlan") -> int:
    """Start Ray and run what is left of the sweep; the exit status. The caller holds the run directory's lock."""
    run, settings = job.run, job.settings
    SCREEN.begin("starting", "Ray")
    with importing():
        from sweeps.execution.context import TrialContext
        from sweeps.reporting.console import wrapped
        from sweeps.runtime.placement import place, placement_line
        from sweeps.runtime.ray_start import started_ray
        from sweeps.storage.shared_path import require_shared

    with started_ray() as nodes:
        cli.catch_signals()
        workers, concurrency = place(
            nodes,
            workers=settings.workers_per_trial,
            gpus_per_worker=settings.gpus_per_worker,
            max_concurrent=settings.max_concurrent,
        )
        require_shared(run.path, settings.storage_path)
        _write_down(job, config, cache, {"concurrency": concurrency, "workers": dataclasses.asdict(workers)})
        SCREEN.end()
        SCREEN.say(*wrapped(f"place     {placement_line(nodes, workers, concurrency)}"))
        context = TrialContext(
            config=config,
            run_dir=run.path,
            workers=workers,
            reroute_tolerance=job.plan.reroute_tolerance,
            profile=settings.profile,
            trial_timeout=settings.trial_timeout,
            session=len(run.record.get("resumed", [])),
        )
        return _driver(job, concurrency).sweep(context, cache)


def _driver(job: Job, concurrency: int) -> "SweepDriver":
    from sweeps.execution.driver import SweepDriver

    settings = job.settings
    return SweepDriver(
        job.run,
        job.plan,
        concurrency,
        ended_before=len(job.found.ended) if job.found else 0,
        early_stop=settings.early_stop,
        behaviour_prompts=settings.behaviour_prompts,
        judge=settings.judge,
        limits=BehaviourLimits.of(vars(settings)),
        calibrate=settings.calibrate,
        max_failures=settings.max_failures,
        retry_failed=settings.retry_failed,
        fixed=tuple(name for name in RECIPE if name in job.run.record["config_overrides"]),
    )


def _write_down(job: Job, config: CircuitBreakerConfig, cache: "CachePlan", placed: dict[str, object]) -> None:
    """Write sweep.json, whole for a sweep that begins, else what may be different from now on."""
    from cbtrain.model.identity import identities
    from sweeps.plan.budget import allocate
    from sweeps.storage.resume import flags_to_keep

    fields = placed | {
        "settings": dataclasses.asdict(job.plan),
        "plan": dataclasses.asdict(allocate(job.plan)),
        "flags": flags_to_keep(job.settings),
    }
    if job.found is not None:
        job.run.go_on(ended=len(job.found.ended), **fields)
        return
    fixed = {
        "config": dataclasses.asdict(config),
        "inputs": identities(config),
        "teacher_cache": cache.directory or cache.says,
        "tolerance": None,
    }
    job.run.create(job.run.record | fields | fixed)


if __name__ == "__main__":
    sys.exit(cli.run(main))
