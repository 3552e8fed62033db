"""One trial: a Ray Train `TorchTrainer` around `cbtrain.loop.train`, inside a Ray Tune function trainable.

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
from dataclasses import dataclass, replace
from pathlib import Path

import ray.train
import ray.tune
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from cbtrain.config import CircuitBreakerConfig
from cbtrain.environment import quiet_libraries
from sweeps.journal import TrialSpec

REPORTED = ("loss_reroute", "loss_retain", "loss_kl", "grad_norm_total", "tokens_per_s", "train_s")
"""Metrics of the loop that a trial's outcome carries beside those named eval_ and base_."""


@dataclass(frozen=True)
class Workers:
    """What one trial runs on."""

    count: int = 1
    """Worker processes a trial."""
    cpus: int = 1
    """CPUs a worker, which is also its number of threads."""
    gpus: float = 0
    """GPUs a worker."""

    @property
    def in_process(self) -> bool:
        """Whether the trial runs in the trainable's own process."""
        return self.count == 1 and self.gpus == 0

    def tune_resources(self) -> dict[str, float]:
        """What Tune reserves for the trainable; workers of its own reserve theirs beside it."""
        return {"CPU": self.cpus} if self.in_process else {"memory": 1}

    def scaling(self) -> ScalingConfig:
        """What Train starts."""
        if self.in_process:
            return ScalingConfig(num_workers=0)
        resources = {"CPU": self.cpus, "GPU": self.gpus} if self.gpus else {"CPU": self.cpus}
        return ScalingConfig(num_workers=self.count, use_gpu=self.gpus > 0, resources_per_worker=resources)


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a sweep share."""

    config: CircuitBreakerConfig
    run_dir: Path
    workers: Workers
    teacher_cache: Path | None = None
    """Where the frozen teacher's states are; None runs it at every step."""


def run_trial(spec_fields: dict, context: TrialContext) -> None:
    """The Tune trainable: train one setting and report its outcome.

    An exception becomes an outcome with status `failed` and its text; the traceback is in the trial's log.
    """
    started = time.perf_counter()
    spec = TrialSpec(**spec_fields)
    with _output_to(context.run_dir, spec.trial_id):
        try:
            metrics = _fit(spec, context)
            outcome = {"status": "completed", "error": "", **_columns(metrics)}
        except Exception as error:
            traceback.print_exc()
            outcome = {"status": "failed", "error": _root_cause(error)}
    ended = {
        "wall_s": time.perf_counter() - started,
        "ended_at": time.time(),
        "process": f"{socket.gethostname()}:{os.getpid()}",
    }
    ray.tune.report(outcome | ended)


def _fit(spec: TrialSpec, context: TrialContext) -> dict[str, float]:
    """Run the trainer; the loop's last metrics on rank 0."""
    callbacks = [] if context.workers.in_process else [TuneReportCallback()]
    return _trainer(functools.partial(train_loop, spec, context), context, spec.trial_id, callbacks).fit().return_value


def _trainer(work: Callable, context: TrialContext, name: str, callbacks: Sequence = ()) -> TorchTrainer:
    """Train's workers around a function of no arguments; a failure is final."""
    return TorchTrainer(
        work,
        scaling_config=context.workers.scaling(),
        run_config=RunConfig(
            name=name,
            storage_path=str(context.run_dir / "ray" / "train"),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=2),
            callbacks=list(callbacks),
        ),
    )


def train_loop(spec: TrialSpec, context: TrialContext) -> dict[str, float]:
    """What each worker runs."""
    quiet_libraries()
    import torch

    from cbtrain import loop
    from cbtrain.metrics import console_line

    torch.set_num_threads(context.workers.cpus)
    config = replace(context.config, beta_kl=spec.beta_kl, kl_temperature=spec.kl_temperature, seed=spec.seed)
    in_process = context.workers.in_process
    report: Callable = ray.tune.report if in_process else ray.train.report

    def report_evaluations(metrics: dict[str, float]) -> None:
        print(console_line(metrics), flush=True)
        if "eval_loss_reroute" in metrics:
            report(dict(metrics))

    directory = context.run_dir / "trials" / spec.trial_id
    rank = 0 if in_process else ray.train.get_context().get_world_rank()
    log = contextlib.nullcontext() if in_process else _output_to(context.run_dir, f"{spec.trial_id}-rank{rank}")
    with log:
        return loop.train(config, directory, report_evaluations, teacher_cache=context.teacher_cache)


def fill_cache_on_workers(directory: Path, context: TrialContext) -> tuple[int, float]:
    """Fill the teacher cache on workers like a trial's; rows that were computed, and the teacher's seconds.

    Raises:
        CacheUnavailableError: whatever went wrong.
    """
    from cbtrain.recall import CacheUnavailableError

    trainer = _trainer(functools.partial(_fill_cache, directory, context), context, "teacher_cache")
    try:
        return trainer.fit().return_value
    except Exception as error:
        raise CacheUnavailableError(f"{directory}: {_root_cause(error)}") from error


def _fill_cache(directory: Path, context: TrialContext) -> tuple[int, float]:
    quiet_libraries()
    import torch

    from cbtrain import loop

    torch.set_num_threads(context.workers.cpus)
    with _output_to(context.run_dir, f"teacher_cache-rank{ray.train.get_context().get_world_rank()}"):
        return loop.fill_teacher_cache(context.config, directory)


def _columns(metrics: dict[str, float]) -> dict[str, float]:
    """The columns of trials.csv among the loop's metrics."""
    evaluation = {name: value for name, value in metrics.items() if name.startswith(("eval_", "base_"))}
    return {"steps": metrics["step"], **{name: metrics[name] for name in REPORTED}, **evaluation}


def _root_cause(error: BaseException) -> str:
    """One line for what went wrong at the bottom of Ray's wrappings."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        error = next(iter(failures.values()))
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]


@contextlib.contextmanager
def _output_to(run_dir: Path, name: str) -> Iterator[None]:
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
