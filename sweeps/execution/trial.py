"""One trial as Ray Tune sees it: a function trainable that has the setting trained and reports its outcome.

A trial of one CPU worker is trained in a kept process (`processes.py`), any other by workers that Ray Train starts for
it. This module imports little, since Tune starts processes for it while trials run.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import ray
import ray.tune
from ray.actor import ActorHandle

from sweeps.execution.context import TrialContext
from sweeps.plan.early_stopping import StopRule
from sweeps.plan.journal import TrialSpec
from sweeps.runtime.failures import LOST, kind_of, root_cause
from sweeps.runtime.interruption import INTERRUPTED
from sweeps.runtime.output import output_to, print_trace
from sweeps.runtime.processes import call
from sweeps.storage.lock import this_process

ENDS_S = 30.0
"""By when what trains has ended itself for want of progress, and Ray knows of it."""
REPORTED = ("loss_reroute", "loss_retain", "loss_kl", "grad_norm_total", "tokens_per_s", "train_s")
PREFIXES = ("eval_", "base_", "resumed_", "grad_", "collapse_step_", "converged")
"""Metrics of the loop that a trial's outcome carries: by name, and all that begin so."""


def run_trial(given: dict, context: TrialContext, processes: Sequence[ActorHandle] = ()) -> None:
    """The Tune trainable: have one setting trained and report its outcome.

    An exception becomes an outcome with status `failed` and its text; the traceback is in the trial's log. A trial
    that was interrupted counts in `wall_s` what its checkpoint had taken. Of a failure its kind is reported as well:
    `failure`, as `kind_of` gives it.

    Args:
        given: the fields of its `TrialSpec`, and where it has them `stop_rule`, `process` (an index) and `halvings` of
            its micro-batch.
        context: the sweep's.
        processes: the kept ones.
    """
    started, earlier_s = time.perf_counter(), 0.0
    fields = dict(given)
    rule, process = fields.pop("stop_rule", None), fields.pop("process", None)
    context = _with_micro_batches(context, fields.pop("halvings", 0))
    spec = TrialSpec(**fields)
    ran_in = this_process()
    handle = None if process is None else processes[process]
    stalled = threading.Event()
    try:
        with _watched(spec, context, handle, stalled):
            if handle is None:
                metrics, reason = _on_its_own_workers(spec, context, rule)
            else:
                metrics, reason, ran_in = _in_kept_process(handle, spec, context, rule)
        status = reason if reason == INTERRUPTED else "stopped" if reason else "completed"
        outcome = {"status": status, "error": reason, **_columns(metrics)}
        earlier_s = metrics.get("earlier_s", 0.0)
    except Exception as error:
        failure, why = kind_of(error), root_cause(error)
        ended_itself = failure == "lost" or (handle is None and failure == "raised")  # another rank lost its peer
        if stalled.is_set() and ended_itself:
            failure, why = "lost", f"no progress for {context.trial_timeout:g} s (--trial-timeout)"
        elif failure == "lost":
            why = LOST
        outcome = {"status": "failed", "error": why, "failure": failure}
    ended = {"wall_s": time.perf_counter() - started + earlier_s, "ended_at": time.time(), "process": ran_in}
    ray.tune.report(outcome | ended)


@contextlib.contextmanager
def _watched(
    spec: TrialSpec, context: TrialContext, process: ActorHandle | None, stalled: threading.Event
) -> Iterator[None]:
    """Notice when nothing that the trial writes has changed for `trial_timeout` seconds.

    What trains ends itself then (`watchdog.py`). Where it has not even begun, this ends it.
    """
    ended = threading.Event()

    def watch() -> None:
        seen, since = _written(spec, context), time.monotonic()
        while not ended.wait(min(1.0, context.trial_timeout / 4)):
            now, waited = _written(spec, context), time.monotonic() - since
            if now != seen:
                seen, since = now, time.monotonic()
                stalled.clear()
            elif waited > context.trial_timeout + ENDS_S:
                os._exit(1) if process is None else ray.kill(process, no_restart=False)
                return
            elif waited > context.trial_timeout:
                stalled.set()

    if context.trial_timeout:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _written(spec: TrialSpec, context: TrialContext) -> list[int]:
    """When what tells of a trial's progress was last written, in nanoseconds."""
    directory = context.run_dir / "trials" / spec.trial_id
    files = [directory / "metrics.jsonl", directory / "lock"]
    return [file.stat().st_mtime_ns if file.exists() else 0 for file in files]


def _with_micro_batches(context: TrialContext, halvings: int) -> TrialContext:
    """The context with the micro-batch halved so often, for the same mathematics in less memory."""
    if not halvings:
        return context
    from cbtrain.data.batches import smaller_micro_batches

    config = context.config
    for _ in range(halvings):
        config = smaller_micro_batches(config, context.workers.count) or config
    return dataclasses.replace(context, config=config)


def _in_kept_process(
    process: ActorHandle, spec: TrialSpec, context: TrialContext, rule: StopRule | None
) -> tuple[dict[str, float], str, str]:
    """What `train_here` returns in the process, and which it was."""
    return call(process, context.run_dir, spec.trial_id, _train_here, spec, context, rule, on_report=ray.tune.report)


def _train_here(
    spec: TrialSpec, context: TrialContext, rule: StopRule | None, report: Callable
) -> tuple[dict[str, float], str, str]:
    from sweeps.execution.training import train_here

    return *train_here(spec, context, rule, report), this_process()


def _on_its_own_workers(spec: TrialSpec, context: TrialContext, rule: StopRule | None) -> tuple[dict[str, float], str]:
    from sweeps.execution.training import train_here, train_on_workers

    with output_to(context.run_dir, spec.trial_id):
        try:
            if context.workers.in_process:
                return train_here(spec, context, rule, ray.tune.report)
            return train_on_workers(spec, context, rule)
        except Exception:
            print_trace()
            raise


def _columns(metrics: dict[str, float]) -> dict[str, float]:
    """The columns of trials.csv among the loop's metrics; none of a trial that did not begin."""
    if not metrics:
        return {}
    others = {name: value for name, value in metrics.items() if name.startswith(PREFIXES)}
    return {"steps": metrics["step"], **{name: metrics[name] for name in REPORTED}, **others}
