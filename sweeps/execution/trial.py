"""One trial: a Ray Train `TorchTrainer` around `cbtrain.training.loop.train`, inside a Ray Tune function trainable.

A trial of one CPU worker runs in the trainable's own process (Train's local mode, `num_workers=0`), which Tune keeps
for the next trial: imports, base model and tokenised data are paid for once. Otherwise Train starts workers.
"""

import contextlib
import functools
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray.train
import ray.tune
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from analysis.constraint import REROUTE_TOLERANCE
from cbtrain.config import CircuitBreakerConfig, InputError
from cbtrain.config.validation import from_json
from cbtrain.utils.environment import quiet_libraries
from cbtrain.utils.errors import named
from sweeps.execution.first_baseline import wait_for_first_baseline
from sweeps.execution.placement import Workers
from sweeps.plan.early_stopping import StoppedEarly, StopRule, held_out_curve, judge
from sweeps.plan.journal import TrialSpec, trial_config
from sweeps.storage.lock import LEFT_RUNNING_S, held

if TYPE_CHECKING:
    from cbtrain.training.loop import TeacherPass

REPORTED = ("loss_reroute", "loss_retain", "loss_kl", "grad_norm_total", "tokens_per_s", "train_s")
PREFIXES = ("eval_", "base_", "resumed_", "grad_", "collapse_step_", "converged")
"""Metrics of the loop that a trial's outcome carries: by name, and all that begin so."""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share."""

    config: CircuitBreakerConfig
    run_dir: Path
    workers: Workers
    teacher_cache: Path | None = None
    """Where the frozen teacher's states are; None runs it at every step."""
    reroute_tolerance: float = REROUTE_TOLERANCE
    """The sweep's limit; a trial whose reroute loss still falls by more has not converged."""
    profile: bool = False
    """Whether each trial writes where its time went."""
    session: int = 0
    """How often the sweep was resumed. Ray's files of each session lie apart: it would restore what it finds."""

    @property
    def ray_directory(self) -> Path:
        """Where Ray keeps its own files."""
        return self.run_dir / "ray" / f"session-{self.session}"


def run_trial(spec_fields: dict, context: TrialContext) -> None:
    """The Tune trainable: train one setting and report its outcome.

    An exception becomes an outcome with status `failed` and its text; the traceback is in the trial's log. A trial
    that was interrupted counts in `wall_s` what its checkpoint had taken.

    Args:
        spec_fields: of its `TrialSpec`, and `stop_rule` where it has one.
        context: the sweep's.
    """
    started, earlier_s = time.perf_counter(), 0.0
    fields = dict(spec_fields)
    rule = fields.pop("stop_rule", None)
    spec = TrialSpec(**fields)
    with output_to(context.run_dir, spec.trial_id):
        try:
            metrics, reason = _fit(spec, context, rule)
            outcome = {"status": "stopped" if reason else "completed", "error": reason, **_columns(metrics)}
            earlier_s = metrics.get("earlier_s", 0.0)
        except Exception as error:
            traceback.print_exc()
            outcome = {"status": "failed", "error": root_cause(error)}
    ended = {
        "wall_s": time.perf_counter() - started + earlier_s,
        "ended_at": time.time(),
        "process": f"{socket.gethostname()}:{os.getpid()}",
    }
    ray.tune.report(outcome | ended)


def _fit(spec: TrialSpec, context: TrialContext, rule: StopRule | None) -> tuple[dict[str, float], str]:
    """Run the trainer; what `train_loop` returned on rank 0."""
    callbacks = [] if context.workers.in_process else [TuneReportCallback()]
    work = functools.partial(train_loop, spec, context, rule)
    return _trainer(work, context, spec.trial_id, callbacks).fit().return_value


def _trainer(work: Callable, context: TrialContext, name: str, callbacks: Sequence = ()) -> TorchTrainer:
    """Train's workers around a function of no arguments; a failure is final."""
    return TorchTrainer(
        work,
        scaling_config=context.workers.scaling(),
        run_config=RunConfig(
            name=name,
            storage_path=str(context.ray_directory / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            callbacks=list(callbacks),
        ),
    )


def train_loop(spec: TrialSpec, context: TrialContext, rule: StopRule | None = None) -> tuple[dict[str, float], str]:
    """What each worker runs.

    Returns:
        The loop's last metrics, and why `rule` stopped it there or it never began; empty where it was completed.
        No exception says so, since Ray would take the worker that raises it for lost.
    """
    quiet_libraries()
    import torch

    from cbtrain.training.metrics import console_line

    torch.set_num_threads(context.workers.cpus)
    config = trial_config(context.config, spec)
    in_process = context.workers.in_process
    report: Callable = ray.tune.report if in_process else ray.train.report
    directory = context.run_dir / "trials" / spec.trial_id
    curve = held_out_curve(directory) if rule else {}  # a resumed trial's, up to where it was killed

    def report_evaluations(metrics: dict[str, float]) -> None:
        print(console_line(metrics), flush=True)
        if "eval_loss_reroute" in metrics:
            report(dict(metrics))
            if rule:
                judge(rule, curve, metrics)  # the metrics are summed over ranks, so all of them end here or none

    rank = 0 if in_process else ray.train.get_context().get_world_rank()
    with contextlib.ExitStack() as stack:
        if not in_process:
            stack.enter_context(output_to(context.run_dir, f"{spec.trial_id}-rank{rank}"))
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(directory / "lock", wait_s=LEFT_RUNNING_S))
        from cbtrain.training import loop  # noqa: F401  while the first baseline trains

        if reason := wait_for_first_baseline(context.run_dir, spec.trial_id):
            return {}, reason
        try:
            return _begin_or_go_on(config, directory, report_evaluations, context), ""
        except StoppedEarly as stop:
            print(f"stopped: {stop}", flush=True)
            return stop.metrics, str(stop)


def _begin_or_go_on(
    config: CircuitBreakerConfig, directory: Path, report: Callable, context: TrialContext
) -> dict[str, float]:
    """Train from the checkpoint of an earlier session, where it left one that fits, else from the start."""
    from cbtrain.training import loop
    from cbtrain.training.checkpoint import CheckpointError
    from cbtrain.utils.profile import OFF, Profile

    train = functools.partial(
        loop.train,
        config,
        directory,
        report,
        teacher_cache=context.teacher_cache,
        reroute_tolerance=context.reroute_tolerance,
        profile=Profile() if context.profile else OFF,
    )
    if (directory / "metrics.jsonl").exists():
        earlier = _checkpointed(directory)
        try:
            return train(resume=True)
        except StoppedEarly as stop:
            stop.metrics |= earlier
            raise
        except CheckpointError as error:
            print(f"begins anew: {error}", flush=True)
    return train()


def _checkpointed(directory: Path) -> dict[str, float]:
    """What the loop would add to the metrics of a run that goes on from the checkpoint here, if it is a good one."""
    from cbtrain.training.checkpoint import MANIFEST, Manifest

    try:
        manifest = from_json((directory / "checkpoint" / MANIFEST).read_bytes(), Manifest)
    except (OSError, InputError):
        return {}
    return {"resumed_from": manifest.step, "earlier_s": sum(manifest.seconds.values())}


def run_teacher_on_workers(directory: Path | None, context: TrialContext) -> "TeacherPass":
    """`cbtrain.training.loop.run_teacher` on workers like a trial's.

    Raises:
        CacheUnavailableError: whatever went wrong with a cache.
        InputError: whatever went wrong without one.
    """
    from cbtrain.teacher_cache.plan import CacheUnavailableError

    try:
        return (
            _trainer(functools.partial(_run_teacher, directory, context), context, "teacher_cache").fit().return_value
        )
    except Exception as error:
        if directory is None:
            raise InputError(f"--model {context.config.model}: its norms: {root_cause(error)}") from error
        raise CacheUnavailableError(f"{directory}: {root_cause(error)}") from error


def on_workers(work: Callable, context: TrialContext, name: str) -> Any:
    """What `work` returns on rank 0 of workers like a trial's.

    Raises:
        InputError: whatever went wrong, in a line.
    """
    try:
        return _trainer(work, context, name).fit().return_value
    except Exception as error:
        raise InputError(f"{name}: {root_cause(error)}; see logs/ in {context.run_dir}") from error


def _run_teacher(directory: Path | None, context: TrialContext) -> "TeacherPass":
    quiet_libraries()
    import torch

    from cbtrain.training import loop

    torch.set_num_threads(context.workers.cpus)
    with output_to(context.run_dir, f"teacher_cache-rank{ray.train.get_context().get_world_rank()}"):
        return loop.run_teacher(context.config, directory)


def _columns(metrics: dict[str, float]) -> dict[str, float]:
    """The columns of trials.csv among the loop's metrics; none of a trial that did not begin."""
    if not metrics:
        return {}
    others = {name: value for name, value in metrics.items() if name.startswith(PREFIXES)}
    return {"steps": metrics["step"], **{name: metrics[name] for name in REPORTED}, **others}


def root_cause(error: BaseException) -> str:
    """One line for what went wrong at the bottom of Ray's wrappings."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return named(error)


@contextlib.contextmanager
def output_to(run_dir: Path, name: str) -> Iterator[None]:
    """Send everything this process prints, libraries written in C included, to `logs/<name>.log` for the body."""
    path = run_dir / "logs" / f"{name}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    logging.basicConfig()  # warnings that are captured as log records come out with the rest
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    try:
        with path.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in kept:
            os.close(descriptor)
