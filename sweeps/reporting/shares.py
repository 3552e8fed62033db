"""Where a sweep's time went: shares of what its slots could have worked, by the profiles of its trials."""

import json
from collections.abc import Sequence
from pathlib import Path

from analysis.formatting import percent
from sweeps.reporting.progress import Row

NAMES = {
    "forward_harmful": "forward harmful",
    "forward_benign": "forward benign",
    "kl": "KL",
    "backward": "backward",
    "optimizer": "optimizer",
    "data": "data",
    "evaluation": "evaluation",
    "checkpoint": "checkpoint",
    "report": "report",
    "start": "start and end of trials",
    "idle": "idle",
}
"""Kinds in the order in which they are told. `start` is what a trial took beyond its loop: imports, the model."""
LEAST = 0.005


def shares(rows: Sequence[Row], trials: Path, wall_s: float, concurrency: int) -> dict[str, float]:
    """Share of wall × concurrency by kind, 1 in all; empty where no trial left a profile.

    Args:
        rows: of trials.csv.
        trials: the directory that holds theirs.
        wall_s: of the sweep.
    """
    seconds = dict.fromkeys(NAMES, 0.0)
    found = False
    for row in rows:
        if not row.get("wall_s"):
            continue
        loop = 0.0
        path = trials / str(row["trial_id"]) / "profile.json"
        if path.is_file():
            found = True
            kinds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
            for kind in kinds.keys() & seconds.keys():
                seconds[kind] += kinds[kind]
                loop += kinds[kind]
        seconds["start"] += max(float(row["wall_s"]) - loop, 0.0)
    if not found:
        return {}
    available = wall_s * concurrency
    seconds["idle"] = max(available - sum(seconds.values()), 0.0)
    return {kind: value / available for kind, value in seconds.items()}


def told(found: dict[str, float]) -> str:
    """`profile   backward 31 %, forward benign 12 %, …, idle 20 %`, the largest first; empty without shares."""
    if not found:
        return ""
    parts = sorted(found.items(), key=lambda item: (item[0] == "idle", -item[1]))
    return "profile   " + ", ".join(f"{NAMES[kind]} {percent(share)}" for kind, share in parts if share >= LEAST)
