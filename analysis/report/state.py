"""How far a sweep is, for all that show it: finished, running, or left in part."""

import math
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from analysis.formatting import count


@dataclass(frozen=True)
class SweepState:
    """Trials by what became of them, and whether more are to come."""

    kind: Literal["finished", "running", "partial"]
    """`partial` is a sweep that was stopped or killed, or that failed, before its end."""
    planned: int
    ended: int
    running: int
    """Trials that had begun and not ended."""
    stopped: int
    failed: int
    last_ended: datetime | None = None
    """UTC; None where trials do not say."""

    @property
    def badge(self) -> str:
        """`finished · 20 of 20`, `RUNNING · 9 of 20`, `PARTIAL · 9 of 20`, with what failed."""
        word = "finished" if self.kind == "finished" else self.kind.upper()
        parts = [word, f"{self.ended} of {self.planned}"]
        if self.kind != "finished" and self.ended >= self.planned:
            parts.append("behaviour to come")
        parts += [f"{self.stopped} stopped early"] if self.stopped else []
        parts += [f"{self.failed} failed"] if self.failed else []
        return " · ".join(parts)

    @property
    def so_far(self) -> str:
        """`9 of 20, 2 running` where the sweep has not ended; empty where it has, be it for want of a baseline."""
        if self.kind == "finished":
            return ""
        if self.ended >= self.planned:
            return f"{self.ended} of {self.planned}, behaviour to come"
        now = "running" if self.kind == "running" else "interrupted"
        return f"{self.ended} of {self.planned}" + (f", {self.running} {now}" if self.running else "")

    @property
    def explained(self) -> str:
        """A sentence on what is not there yet; empty of a finished sweep."""
        if self.kind == "finished":
            return ""
        left = max(self.planned - self.ended - self.running, 0)
        what = f"{count(left, 'trial')} of {self.planned} to come"
        if self.ended >= self.planned:
            what = "what the models write to come"
        elif self.running:
            what += f", {self.running} {'running' if self.kind == 'running' else 'broken off'}"
        now = "The sweep is running" if self.kind == "running" else "The sweep was interrupted"
        last = f" The last trial ended {self.last_ended:%Y-%m-%d %H:%M} UTC." if self.last_ended else ""
        return f"{now}: {what}.{last} What stands here may change; do not ship it."


def state_of(sweep: Mapping[str, Any], trials: pd.DataFrame) -> SweepState:
    """The state of a sweep by its sweep.json, its trials, and whether the process that drives it lives."""
    states = trials["status"].value_counts()
    running = int(states.get("running", 0))
    ended, planned = len(trials) - running, int(sweep["settings"].get("num_samples", len(trials)))
    status = sweep.get("status")  # which an old sweep.json may not have
    goes_on = status in ("running", "interrupted", "failed")
    kind: Literal["finished", "running", "partial"] = "partial"
    if status == "finished" or (ended >= planned and not goes_on):
        kind = "finished"
    elif status == "running" and not _driver_is_gone(Path(sweep["run_dir"])):
        kind = "running"
    return SweepState(
        kind,
        planned,
        ended,
        running,
        stopped=int(states.get("stopped", 0)),
        failed=int(states.get("failed", 0)),
        last_ended=last_ended(trials),
    )


def last_ended(trials: pd.DataFrame) -> datetime | None:
    """When the last trial ended, UTC; None where trials do not say."""
    last = float(pd.to_numeric(trials.get("ended_at", pd.Series(dtype=float)), errors="coerce").max())
    return datetime.fromtimestamp(last, UTC) if math.isfinite(last) else None


def _driver_is_gone(run_dir: Path) -> bool:
    """Whether the sweep's driver was a process of this machine that lives no more: a killed one cannot say so."""
    try:
        host, _, process = (run_dir / "lock").read_text(encoding="utf-8").strip().rpartition(":")
        if host != socket.gethostname():
            return False
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        return False
    return False
