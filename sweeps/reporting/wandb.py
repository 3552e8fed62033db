"""A sweep on Weights & Biases: a run a trial, and one for the decision with its figures, all in one group.

    python -m sweeps.reporting.wandb RUN_DIR --project P --mode offline

follows a run directory: it reads the ids of trials that have ended from standard input, a line each, logs each from
its files, and when there are no more, and the sweep is finished, the decision. The sweep starts it beside itself, so
that whatever W&B does or prints neither delays nor fails a trial. It starts no Ray and imports no torch.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from cbtrain.config import InputError
from cbtrain.utils.metrics_file import read_metrics
from cbtrain.utils.tracking import Mode, Tracker, open_tracker

ROOT = Path(__file__).resolve().parents[2]
SUMMARY = "decision"
"""Name of the run that is no trial's."""
LOG = Path("logs", "wandb.log")
LOGGED = Path("wandb", "logged.txt")
"""What a run directory's runs on W&B are, a name a line: a sweep that is resumed leaves them as they are."""
AT_THE_END_S, WHEN_STOPPED_S = 600.0, 10.0
"""How long a sweep waits for W&B when it has finished, and when it was stopped."""


def require_login(mode: Mode) -> None:
    """Refuse to begin a sweep that would be logged nowhere.

    Raises:
        InputError: `mode` is online, and W&B knows no user on this machine.
    """
    os.environ["WANDB_SILENT"] = "true"
    import wandb

    if mode == "online" and not wandb.login(prompt=False):
        raise InputError("--wandb-project: no login to W&B here: run `wandb login`, or give --wandb-mode offline")


@contextlib.contextmanager
def followed(run_dir: Path, shown: Path, project: str | None, mode: Mode) -> Iterator[Callable[[Iterable[str]], None]]:
    """Have another process log a sweep to W&B while the body runs, and say at its end what came of it.

    Args:
        run_dir: the sweep's.
        shown: the same as the user wrote it.
        project: W&B's project; None logs nothing.
        mode: `offline` writes to `RUN_DIR/wandb`, for `wandb sync`.

    Yields:
        What is to be called with the ids of trials that have ended; it never raises.
    """
    if project is None:
        yield lambda _ended: None
        return
    command = [sys.executable, "-m", "sweeps.reporting.wandb", str(run_dir), "--project", project, "--mode", mode]
    with (run_dir / LOG).open("a") as log:
        follower = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    assert follower.stdin is not None

    try:
        # A descriptor and no file: Tune pickles whatever its searcher holds.
        yield functools.partial(_tell, follower.stdin.fileno())
    except BaseException:
        _end(follower, WHEN_STOPPED_S)
        raise
    _end(follower, AT_THE_END_S)
    print(_what_was_logged(run_dir, shown, project, mode), flush=True)


def _tell(descriptor: int, ended: Iterable[str]) -> None:
    with contextlib.suppress(OSError):  # the process is gone: its log says why
        os.write(descriptor, "".join(f"{trial_id}\n" for trial_id in sorted(ended)).encode())


def _end(follower: subprocess.Popen, wait_s: float) -> None:
    """Let the process log what it was told of, then end it."""
    assert follower.stdin is not None
    with contextlib.suppress(OSError):
        follower.stdin.close()
    for patience, then in ((wait_s, follower.terminate), (WHEN_STOPPED_S, follower.kill)):
        try:
            follower.wait(patience)
        except subprocess.TimeoutExpired:
            then()
    follower.wait()


def _what_was_logged(run_dir: Path, shown: Path, project: str, mode: Mode) -> str:
    ended = pd.read_csv(run_dir / "trials.csv")["status"].ne("running").sum()
    logged = len(_logged(run_dir))
    if logged <= ended:
        return f"wandb     {logged} of {ended + 1} runs logged; the rest: see {shown / LOG}"
    if mode == "offline":
        return f"wandb     {logged} runs, offline: wandb sync {shown}/wandb/offline-run-*"
    return f"wandb     {logged} runs in project {project}, group {run_dir.name}"


def main() -> int:
    """Follow a run directory until standard input ends; its exit status is 0, whatever W&B did."""
    parser = argparse.ArgumentParser(
        prog="python -m sweeps.reporting.wandb", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--project", required=True)
    parser.add_argument("--mode", choices=("online", "offline"), default="online")
    arguments = parser.parse_args()

    def tracked(name: str, config: dict[str, Any]) -> Tracker:
        run_dir = arguments.run_dir
        return open_tracker(
            arguments.project, arguments.mode, group=run_dir.name, name=name, directory=run_dir, config=config
        )

    logged = _logged(arguments.run_dir)
    for line in sys.stdin:
        trial_id = line.strip()
        if trial_id not in logged and log_trial(arguments.run_dir, trial_id, tracked):
            _note(arguments.run_dir, trial_id)
    record = json.loads((arguments.run_dir / "sweep.json").read_text())
    if record["status"] == "finished" and log_decision(arguments.run_dir, record, tracked):
        _note(arguments.run_dir, SUMMARY)
    return 0


Tracked = Callable[[str, dict[str, Any]], Tracker]
"""Opens a run by its name and settings."""


def log_trial(run_dir: Path, trial_id: str, tracked: Tracked) -> bool:
    """Log a trial that has ended: its settings, every line of metrics.jsonl, and its row of trials.csv as the summary.

    Returns:
        Whether W&B took all of it.
    """
    directory = run_dir / "trials" / trial_id
    trials = pd.read_csv(run_dir / "trials.csv")
    row = _without_blanks(trials[trials.trial_id == trial_id].iloc[0].to_dict())
    about = {name: row[name] for name in ("trial_id", "phase", "beta_kl", "kl_temperature", "seed")}
    config, metrics = directory / "config.json", directory / "metrics.jsonl"
    settings = json.loads(config.read_text()) if config.is_file() else {}
    tracker = tracked(f"{run_dir.name}-{trial_id}", settings | about)
    for values in read_metrics(metrics, skip_damaged=True):
        tracker.log(values, step=int(values["step"]))
    tracker.summary(row)
    taken = tracker.active
    tracker.close(int(row["status"] == "failed"))
    return taken


def log_decision(run_dir: Path, record: dict[str, Any], tracked: Tracked) -> bool:
    """Write the sweep's report, and log its decision and figures.

    Returns:
        Whether W&B took all of it.
    """
    from analysis.pick_beta import write_report  # seconds of imports, at the very end

    write_report(run_dir)
    decision = json.loads((run_dir / "report" / "decision.json").read_text())
    tracker = tracked(f"{run_dir.name}-{SUMMARY}", record["config"] | record["settings"])
    tracker.summary({**decision, "tolerance": record["tolerance"], "wall_s": record["wall_s"]})
    for figure in sorted((run_dir / "report" / "figures").iterdir()):
        tracker.figure(figure.stem, figure)
    taken = tracker.active
    tracker.close()
    return taken


def _without_blanks(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not (isinstance(value, float) and math.isnan(value))}


def _logged(run_dir: Path) -> set[str]:
    path = run_dir / LOGGED
    return set(path.read_text().split()) if path.is_file() else set()


def _note(run_dir: Path, name: str) -> None:
    (run_dir / LOGGED).parent.mkdir(exist_ok=True)
    with (run_dir / LOGGED).open("a") as file:
        file.write(f"{name}\n")


if __name__ == "__main__":
    sys.exit(main())
