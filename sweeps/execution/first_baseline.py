"""The first baseline goes ahead: the other trials train once it has rerouted; without that they would be in vain.

They start beside it and import their libraries meanwhile, so that hardly any time is lost. One seed may be a bad one:
where the first has ended without rerouting, the second baseline has its turn before the others.
"""

import contextlib
import csv
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from analysis.constraint import baseline_rerouted
from cbtrain.utils.metrics_file import read_metrics
from cbtrain.utils.stopping import Asked, never
from sweeps.plan.plan import LEADERS
from sweeps.runtime.interruption import INTERRUPTED
from sweeps.runtime.processes import nothing

POLL_S = 0.1
NOT_BEGUN = "not begun: no baseline that went ahead rerouted"


def wait_for_first_baseline(
    run_dir: Path, trial_id: str, stop: Asked = never, waiting: Callable[[], None] = nothing
) -> str:
    """Return when a baseline before this trial has rerouted, or those that go ahead have ended.

    Args:
        waiting: is called again and again until then.

    Returns:
        Why the trial shall not begin; empty where it shall.
    """
    while True:
        if stop():
            return INTERRUPTED
        leaders = list(_leaders(run_dir / "trials.csv"))
        before = [(name, status) for name, status in leaders if name < trial_id]
        # What they logged is read after the statuses: of a trial that has ended it is all.
        if any(_rerouted(run_dir, name) for name, _ in before):
            return ""
        if all(status != "running" for _, status in before):
            leads = trial_id in [name for name, _ in leaders]
            in_vain = bool(before) and all(status == "completed" for _, status in before)  # of a failed one: unknown
            return NOT_BEGUN if in_vain and not leads else ""
        waiting()
        with contextlib.suppress(FileNotFoundError):  # of a trial that is tried by itself
            os.utime(run_dir / "trials" / trial_id / "lock")  # which tells --trial-timeout that it waits and lives
        time.sleep(POLL_S)


def _rerouted(run_dir: Path, trial_id: str) -> bool:
    """By a held-out evaluation, or by the loss of a training step, which comes earlier."""
    logged = read_metrics(run_dir / "trials" / trial_id / "metrics.jsonl", skip_damaged=True)
    losses = [line[name] for line in logged for name in ("loss_reroute", "eval_loss_reroute") if name in line]
    return any(baseline_rerouted([float(loss)]) for loss in losses)


def _leaders(trials: Path) -> Iterator[tuple[str, str]]:
    """Name and status of the baselines that go ahead; none for a trial that is run by itself."""
    if not trials.is_file():
        return
    with trials.open(newline="", encoding="utf-8") as file:
        for row in list(csv.DictReader(file))[:LEADERS]:
            if row["phase"] == "baseline":
                yield row["trial_id"], row["status"]
