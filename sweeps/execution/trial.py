"""One trial as Ray Tune sees it: a function trainable that has the setting trained and reports its outcome.

A trial of one CPU worker is trained in a kept process (`processes.py`), any other by workers that Ray Train starts for
it. This module imports little, since Tune starts processes for it while trials run.
"""

import time
import traceback
from collections.abc import Callable, Sequence

import ray.tune
from ray.actor import ActorHandle

from sweeps.execution.context import TrialContext
from sweeps.execution.output import output_to
from sweeps.execution.processes import call, name_of_this, root_cause
from sweeps.plan.early_stopping import StopRule
from sweeps.plan.journal import TrialSpec

REPORTED = ("loss_reroute", "loss_retain", "loss_kl", "grad_norm_total", "tokens_per_s", "train_s")
PREFIXES = ("eval_", "base_", "resumed_", "grad_", "collapse_step_", "converged")
"""Metrics of the loop that a trial's outcome carries: by name, and all that begin so."""


def run_trial(given: dict, context: TrialContext, processes: Sequence[ActorHandle] = ()) -> None:
    """The Tune trainable: have one setting trained and report its outcome.

    An exception becomes an outcome with status `failed` and its text; the traceback is in the trial's log. A trial
    that was interrupted counts in `wall_s` what its checkpoint had taken.

    Args:
        given: the fields of its `TrialSpec`, and `stop_rule` and `process` (an index) where it has them.
        context: the sweep's.
        processes: the kept ones.
    """
    started, earlier_s = time.perf_counter(), 0.0
    fields = dict(given)
    rule, process = fields.pop("stop_rule", None), fields.pop("process", None)
    spec = TrialSpec(**fields)
    ran_in = name_of_this()
    try:
        if process is None:
            metrics, reason = _on_its_own_workers(spec, context, rule)
        else:
            metrics, reason, ran_in = _in_kept_process(processes[process], spec, context, rule)
        outcome = {"status": "stopped" if reason else "completed", "error": reason, **_columns(metrics)}
        earlier_s = metrics.get("earlier_s", 0.0)
    except Exception as error:
        outcome = {"status": "failed", "error": root_cause(error)}
    ended = {"wall_s": time.perf_counter() - started + earlier_s, "ended_at": time.time(), "process": ran_in}
    ray.tune.report(outcome | ended)


def _in_kept_process(
    process: ActorHandle, spec: TrialSpec, context: TrialContext, rule: StopRule | None
) -> tuple[dict[str, float], str, str]:
    """What `train_here` returns in the process, and which it was."""
    return call(process, context.run_dir, spec.trial_id, _train_here, spec, context, rule, on_report=ray.tune.report)


def _train_here(
    spec: TrialSpec, context: TrialContext, rule: StopRule | None, report: Callable
) -> tuple[dict[str, float], str, str]:
    from sweeps.execution.training import train_here

    return *train_here(spec, context, rule, report), name_of_this()


def _on_its_own_workers(spec: TrialSpec, context: TrialContext, rule: StopRule | None) -> tuple[dict[str, float], str]:
    from sweeps.execution.training import train_here, train_on_workers

    with output_to(context.run_dir, spec.trial_id):
        try:
            if context.workers.in_process:
                return train_here(spec, context, rule, ray.tune.report)
            return train_on_workers(spec, context, rule)
        except Exception:
            traceback.print_exc()
            raise


def _columns(metrics: dict[str, float]) -> dict[str, float]:
    """The columns of trials.csv among the loop's metrics; none of a trial that did not begin."""
    if not metrics:
        return {}
    others = {name: value for name, value in metrics.items() if name.startswith(PREFIXES)}
    return {"steps": metrics["step"], **{name: metrics[name] for name in REPORTED}, **others}
