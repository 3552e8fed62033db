"""A sweep on Weights & Biases, as the sweep sees it: a process beside it (`sweeps.reporting.follower`) that it starts
and ends, and a line on what came of that.
"""

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from cbtrain.config import InputError
from cbtrain.utils.tracking import Mode, logged_in
from sweeps.reporting.follower import logged_runs
from sweeps.reporting.screen import SCREEN

ROOT = Path(__file__).resolve().parents[2]
LOG = Path("logs", "wandb.log")
AT_THE_END_S, WHEN_STOPPED_S = 600.0, 10.0
"""How long a sweep waits for W&B when it has finished, and when it was stopped."""


def require_login(mode: Mode) -> None:
    """Refuse to begin a sweep that would be logged nowhere.

    Raises:
        InputError: `mode` is online, and W&B knows no user on this machine.
    """
    if mode == "online" and not logged_in():
        raise InputError("--wandb-project: no login to W&B here: run `wandb login`, or give --wandb-mode offline")


@contextlib.contextmanager
def followed(run_dir: Path, shown: Path, project: str | None, mode: Mode) -> Iterator[None]:
    """Have another process log a sweep to W&B while the body runs, and say at its end what came of it.

    Args:
        run_dir: the sweep's.
        shown: the same as the user wrote it.
        project: W&B's project; None logs nothing.
        mode: `offline` writes to `RUN_DIR/wandb`, for `wandb sync`.
    """
    if project is None:
        yield
        return
    command = [sys.executable, "-m", "sweeps.reporting.follower", str(run_dir), "--project", project, "--mode", mode]
    with (run_dir / LOG).open("a") as log:
        follower = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    except BaseException:
        _end(follower, WHEN_STOPPED_S)
        raise
    _end(follower, AT_THE_END_S)
    SCREEN.end()
    SCREEN.conclude(_what_was_logged(run_dir, shown, project, mode))


def _end(follower: subprocess.Popen, wait_s: float) -> None:
    """Let the process log what is left, then end it."""
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
    logged = len(logged_runs(run_dir))
    if logged <= ended:
        return f"wandb     {logged} of {ended + 1} runs logged; the rest: see {shown / LOG}"
    if mode == "offline":
        return f"wandb     {logged} runs, offline: wandb sync {shown}/wandb/offline-run-*"
    return f"wandb     {logged} runs in project {project}, group {run_dir.name}"
