"""What trains a setting: a Ray Train `TorchTrainer` around `cbtrain.training.loop.train`.

Where the trial has one CPU worker Train works in the process that it is called in (its local mode, `num_workers=0`),
which is kept for the next trial: imports, base model and tokenised data are paid for once. Otherwise it starts workers.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray.train
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback

from cbtrain.config import CircuitBreakerConfig
from cbtrain.utils.environment import quiet_libraries
from cbtrain.utils.stopping import Asked, Interrupted, never
from sweeps.execution.context import TrialContext
from sweeps.execution.first_baseline import wait_for_first_baseline
from sweeps.plan.early_stopping import StoppedEarly, StopRule, held_out_curve, judge
from sweeps.plan.journal import TrialSpec, trial_config
from sweeps.runtime.interruption import INTERRUPTED
from sweeps.runtime.output import output_to
from sweeps.runtime.processes import Processes, call, nothing
from sweeps.runtime.watchdog import ended_without_progress
from sweeps.storage.lock import LEFT_RUNNING_S, held


def train_here(
    spec: TrialSpec, context: TrialContext, rule: StopRule | None, report: Callable
) -> tuple[dict[str, float], str]:
    """What `train_loop` returns in this process; `report` takes every evaluation."""
    work = functools.partial(train_loop, spec, context, rule, report)
    return _trainer(work, context, spec.trial_id).fit().return_value


def train_on_workers(spec: TrialSpec, context: TrialContext, rule: StopRule | None) -> tuple[dict[str, float], str]:
    """What `train_loop` returns on rank 0 of workers of the trial's own, whose reports Tune gets."""
    work = functools.partial(train_loop, spec, context, rule)
    return _trainer(work, context, spec.trial_id, [TuneReportCallback()]).fit().return_value


def run_once(
    work: Callable[[Callable[[Any], None]], Any],
    context: TrialContext,
    processes: Processes | None,
    name: str,
    on_report: Callable[[Any], None] = nothing,
) -> Any:
    """What `work(report)` returns on what a trial runs on, of several workers on rank 0.

    Args:
        work: can be pickled. From workers that are started for it reports do not come back.
        processes: the kept ones, where trials run in them.
        name: of its log.
    """
    if processes is not None:
        return call(processes.handles[0], context.run_dir, name, work, on_report=on_report)
    return _trainer(functools.partial(_on_worker, work, context, name), context, name).fit().return_value


def _on_worker(work: Callable, context: TrialContext, name: str) -> Any:
    quiet_libraries()
    import torch

    torch.set_num_threads(context.workers.cpus)
    with output_to(context.run_dir, f"{name}-rank{ray.train.get_context().get_world_rank()}"):
        return work(nothing)


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


def train_loop(
    spec: TrialSpec, context: TrialContext, rule: StopRule | None = None, report: Callable | None = None
) -> tuple[dict[str, float], str]:
    """What each worker runs; `report` takes every evaluation, where it is not Train that does.

    Returns:
        The loop's last metrics, and why `rule` stopped it there or it never began; empty where it was completed,
        `INTERRUPTED` where the driver asked for it. No exception says so, since Ray would take the worker that raises
        it for lost.
    """
    config = trial_config(context.config, spec)
    in_process = context.workers.in_process
    directory = context.run_dir / "trials" / spec.trial_id
    curve = held_out_curve(directory) if rule else {}  # a resumed trial's, up to where it was killed

    def report_evaluations(metrics: dict[str, float]) -> None:
        from cbtrain.training.metrics import console_line

        progress()
        print(console_line(metrics), flush=True)
        if "eval_loss_reroute" in metrics:
            (report or ray.train.report)(dict(metrics))
            if rule:
                judge(rule, curve, metrics)  # the metrics are summed over ranks, so all of them end here or none

    rank = 0 if in_process else ray.train.get_context().get_world_rank()
    with contextlib.ExitStack() as stack:
        if not in_process:
            stack.enter_context(output_to(context.run_dir, f"{spec.trial_id}-rank{rank}"))
        progress = stack.enter_context(ended_without_progress(context.trial_timeout))
        if rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(directory / "lock", wait_s=LEFT_RUNNING_S))
        quiet_libraries()
        import torch

        from cbtrain.training import loop  # noqa: F401  while the first baseline trains
        from cbtrain.utils import distributed

        torch.set_num_threads(context.workers.cpus)
        stop = context.stop_file
        reason = wait_for_first_baseline(context.run_dir, spec.trial_id, stop.asked, progress)
        if distributed.any_rank(reason == INTERRUPTED):
            return {}, INTERRUPTED
        if reason:
            return {}, reason
        try:
            return _begin_or_go_on(config, directory, report_evaluations, context, stop.asked), ""
        except Interrupted as error:
            print(error, flush=True)
            return {}, INTERRUPTED
        except StoppedEarly as stop:
            print(f"stopped: {stop}", flush=True)
            return stop.metrics, str(stop)


def _begin_or_go_on(
    config: CircuitBreakerConfig, directory: Path, report: Callable, context: TrialContext, stop: Asked = never
) -> dict[str, float]:
    """Train from the checkpoint of an earlier session, where it left one that fits, else from the start."""
    from cbtrain.checkpoints.checkpoint import CheckpointError
    from cbtrain.training import loop
    from cbtrain.utils.profile import OFF, Profile

    train = functools.partial(
        loop.train,
        config,
        directory,
        report,
        teacher_cache=context.teacher_cache,
        reroute_tolerance=context.reroute_tolerance,
        profile=Profile() if context.profile else OFF,
        stop=stop,
    )
    if (directory / "metrics.jsonl").exists():
        earlier = _checkpointed(directory, config, context.workers.count)
        try:
            return train(resume=True)
        except StoppedEarly as stop:
            stop.metrics |= earlier
            raise
        except CheckpointError as error:
            print(f"begins anew: {error}", flush=True)
    return train()


def _checkpointed(directory: Path, config: CircuitBreakerConfig, workers: int) -> dict[str, float]:
    """What the loop would add to the metrics of a run that goes on from the checkpoint here, if it is a good one."""
    from cbtrain.checkpoints.manifest import progress_of

    progress = progress_of(directory / "checkpoint", config, workers)
    return {"resumed_from": progress.step, "earlier_s": sum(progress.seconds.values())} if progress.step else {}
